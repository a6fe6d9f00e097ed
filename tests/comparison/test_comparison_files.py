import json
import math

import pytest

from lightning_distill.comparison.files import clear, open_folder, slug, student_path
from lightning_distill.files import write_json


def test_slug_is_a_plain_folder_name():
    assert slug("student alone") == "student-alone"
    assert slug("KD (τ = 4, α = 0.5)") == "kd-4-0.5"
    assert slug("../..//etc") == "etc"


@pytest.mark.parametrize("name", ["", "…", "..", "wandb", "WandB"])
def test_slug_refuses_names_without_a_folder_of_their_own(name):
    with pytest.raises(ValueError, match="cannot name a method"):
        slug(name)


def test_student_path_of_a_method_and_of_a_reference(tmp_path):
    assert student_path(tmp_path, "Big teacher") == tmp_path / "big-teacher" / "student.safetensors"
    assert student_path(tmp_path, "KD", seed=3) == tmp_path / "kd" / "seed3" / "student.safetensors"


def test_json_is_strict_and_complete_or_absent(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"good": 1.5, "bad": math.nan, "list": [math.inf, (1, 2)]})
    assert json.loads(path.read_text()) == {"good": 1.5, "bad": None, "list": [None, [1, 2]]}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"good": object()})
    assert json.loads(path.read_text())["good"] == 1.5
    assert list(path.parent.iterdir()) == [path]


def test_the_same_configuration_opens_the_same_comparison(tmp_path):
    configuration = {"trainer": {"max_epochs": 3}, "sizes": (1, 2)}
    identifier = open_folder(tmp_path, ["a"], configuration)
    assert open_folder(tmp_path, ["a", "b"], configuration) == identifier
    assert json.loads((tmp_path / "configuration.json").read_text())["folders"] == ["a", "b"]


def test_another_configuration_is_refused_with_what_changed(tmp_path):
    before = {"trainer": {"max_epochs": 3, "devices": 1}, "data": "digits", "old": None}
    open_folder(tmp_path, ["a"], before)
    after = {"trainer": {"max_epochs": 4, "devices": 1}, "data": "digits", "new": [1]}
    with pytest.raises(ValueError, match="another configuration") as error:
        open_folder(tmp_path, ["a"], after)
    for change in ("`trainer.max_epochs` was 3, is 4", "`old` was null, is missing", "`new` was missing, is [1]"):
        assert change in str(error.value)
    assert "`data`" not in str(error.value)
    assert "`fresh=True` (`--fresh`)" in str(error.value)


def test_methods_may_be_added_but_not_changed(tmp_path):
    open_folder(tmp_path, ["a"], {"methods": {"a": {"alpha": 0.5}}})
    open_folder(tmp_path, ["a", "b"], {"methods": {"a": {"alpha": 0.5}, "b": {"alpha": 0.1}}})
    with pytest.raises(ValueError, match=r"`methods\.a\.alpha` was 0\.5, is 0\.9"):
        open_folder(tmp_path, ["a"], {"methods": {"a": {"alpha": 0.9}}})


def test_a_removed_method_cannot_come_back_changed(tmp_path):
    """Its finished runs are still there."""
    open_folder(tmp_path, ["a", "b"], {"methods": {"a": 1, "b": 1}})
    open_folder(tmp_path, ["a"], {"methods": {"a": 1}})
    with pytest.raises(ValueError, match=r"`methods\.b` was 1, is 2"):
        open_folder(tmp_path, ["a", "b"], {"methods": {"a": 1, "b": 2}})


def test_configuration_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="`configuration` must consist of what JSON can hold"):
        open_folder(tmp_path, ["a"], {"optimizer": object()})


def test_fresh_deletes_the_comparison_and_nothing_else(tmp_path):
    first = open_folder(tmp_path, ["my method"], {"lr": 1})
    for made in ("my-method/seed0/result.json", "results.json", "gain.png", "wandb/run.wandb"):
        write_json(tmp_path / made, {})
    write_json(tmp_path / "notes" / "mine.json", {})
    assert open_folder(tmp_path, ["other"], {"lr": 2}, fresh=True) != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configuration.json", "notes"]


def test_fresh_does_not_delete_a_folder_that_is_none_of_a_comparison(tmp_path):
    write_json(tmp_path / "thesis.json", {})
    with pytest.raises(ValueError, match="not the folder of a comparison"):
        open_folder(tmp_path, ["a"], fresh=True)
    assert (tmp_path / "thesis.json").exists()


def test_clear_of_nothing_is_nothing(tmp_path):
    clear(tmp_path)
    clear(tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
