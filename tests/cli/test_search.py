"""lightning-distill search, from YAML."""

import copy
import sys
from pathlib import Path

import pytest
import yaml

from lightning_distill.cli import main
from lightning_distill.cli.search import confirmation, with_settings
from lightning_distill.comparison import Comparison
from lightning_distill.files import read_json
from lightning_distill.search import Search, Trial

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line shows users whatever it has to warn of

MLP = "lightning_distill.networks.MLP"
SEARCH = {
    "title": "a small search",
    "folder": "found",
    "trials": 3,
    "space": {
        "model.init_args.temperature": {"low": 1.0, "high": 8.0, "log": True},
        "model.init_args.terms.soft": [
            {"class_path": "SoftTargets"},
            {"class_path": "DKD", "init_args": {"beta": 2.0}},
        ],
    },
    "base": {
        "model": {
            "class_path": "KD",
            "init_args": {
                "temperature": 4.0,
                "student": {"class_path": MLP, "init_args": {"sizes": [64, 8, 10]}},
                "teacher": {
                    "class_path": "lightning_distill.teachers.load_network",
                    "init_args": {
                        "network": {"class_path": MLP, "init_args": {"sizes": [64, 32, 10]}},
                        "path": "{folder}/teacher/student.safetensors",
                    },
                },
                "terms": {"soft": {"class_path": "SoftTargets"}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.05}},
            },
        },
        "data": {"class_path": "DigitsDataModule", "init_args": {"num_labels": 100, "seed": "{seed}"}},
        "trainer": {"accelerator": "cpu", "max_epochs": 1},
    },
    "reference": {
        "teacher": {
            "model": {
                "init_args": {
                    "alpha": 1.0,
                    "teacher": None,
                    "terms": None,
                    "student": {"class_path": MLP, "init_args": {"sizes": [64, 32, 10]}},
                    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                }
            }
        }
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder, **changes):
    configuration = with_settings(copy.deepcopy(SEARCH), changes)
    (folder / "search.yaml").write_text(yaml.safe_dump(configuration))
    return ["search", "-c", "search.yaml"]


def test_a_search_and_the_comparison_that_it_prints(folder, capsys):
    main(write(folder))
    printed = capsys.readouterr().out
    assert "a small search" in printed
    assert "lightning-distill compare -c found/compare.yaml" in printed
    first = read_json(folder / "found" / "results.json")["trials"]
    assert [trial["state"] for trial in first] == ["complete"] * 3
    assert first[0]["settings"] == {  # what `base` has
        "model.init_args.temperature": 4.0,
        "model.init_args.terms.soft": {"class_path": "SoftTargets"},
    }
    written = yaml.safe_load((folder / "found" / "compare.yaml").read_text())
    assert written["seeds"] == [1, 2, 3, 4, 5]
    assert written["metric"] == "test/accuracy"
    main([*write(folder), "--trials", "4"])
    more = read_json(folder / "found" / "results.json")["trials"]
    assert more[:3] == first
    assert len(more) == 4
    main(["compare", "-c", "found/compare.yaml", "--seeds", "[7, 8]", "--wandb", "off"])
    comparison = Comparison.load(folder / "found" / "confirmation")
    assert comparison.methods[0] == "base"
    assert len(comparison.runs) == 4
    assert not (folder / "found" / "confirmation" / "teacher").exists()  # that of the search teaches


def test_students_over_a_limit_are_not_trained(folder):
    sizes = {"model.init_args.student.init_args.sizes": [[64, 8, 10], [64, 80, 10]]}
    limits = ["--max_bytes", "4000", "--max_latency", "1", "--cost_model", "ideal", "--sampler", "random"]
    main([*write(folder, trials=4, space=sizes), *limits])
    found = read_json(folder / "found" / "results.json")["trials"]
    assert {trial["state"] for trial in found} == {"complete", "pruned"}
    for trial in found:
        assert (trial["note"] == "over the limits: bytes 24040, limit 4000") == (trial["state"] == "pruned")


def test_configurations_reach_the_command_as_they_are_written(folder, monkeypatch):
    """With the class's defaults filled in, a method could not be merged into what is common."""
    seen = {}
    monkeypatch.setattr("lightning_distill.cli.comparison.compare", lambda methods, **rest: seen.update(rest))
    monkeypatch.setattr("rich.print", lambda *texts: None)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    methods = {"a": SEARCH["base"], "b": {"model": {"init_args": {"optimizer": optimizer}}}}
    configuration = {"methods": methods, "common": SEARCH["base"], "control": "a", "folder": "x"}
    (folder / "c.yaml").write_text(yaml.safe_dump(configuration))
    with pytest.raises(AttributeError, match="folder"):  # the table of nothing
        main(["compare", "-c", "c.yaml"])
    merged = seen["configuration"]["methods"]["b"]["model"]["init_args"]["optimizer"]
    assert merged == {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.05, "lr": 0.01}}


def test_what_is_confirmed():
    base = {"model": {"init_args": {"path": "{folder}/t", "seed": "{seed}", "list": ["{folder}"]}}}
    trials = tuple(Trial(i, "complete", {"model.init_args.x": i}, (float(i), float(-i))) for i in range(6))
    one = confirmation(Search(Path("f"), ("val/accuracy",), ("max",), (3,), tuple(t_one(t) for t in trials), "t"), base)
    assert one["common"]["model"]["init_args"] == {"path": "f/t", "seed": "{seed}", "list": ["f"]}
    assert one["methods"] == {"base": {}, "trial 5": {"model": {"init_args": {"x": 5}}}}
    assert one["seeds"] == [4, 5, 6, 7, 8]
    several = confirmation(Search(Path("f"), ("val/a", "val/b"), ("max", "max"), (0,), trials, "t"), base)
    assert len(several["methods"]) == 5  # all six are on the front
    assert several["metric"] == "test/a"


def t_one(trial):
    return Trial(trial.number, trial.state, trial.settings, trial.values[:1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"model.init_args.temprature": [1.0, 2.0]}}, "Option 'temprature' is not accepted"),
        ({"space": {"model.init_args.alpha": {"low": 0.0, "high": 2.0}}}, None),
        ({"space": {"modle.init_args.alpha": [0.0]}}, r"has the keys \['modle'\]"),
        ({"metric": "test/accuracy"}, "chosen by test data"),
        ({"base.model.class_path": "KDD"}, "configuration of the method 'teacher' is not valid"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_first_training(folder, changes, message):
    if message is None:  # a value that the module refuses comes up in its trial, and the search tells which
        message = "`alpha`"
    with pytest.raises(SystemExit, match=message):
        main(write(folder, **changes))
    if message != "`alpha`":
        assert not (folder / "found" / "trials").exists()


def test_without_optuna_the_command_names_the_extra(folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lightning_distill.search")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install 'lightning-distill\[search\]'"):
        main(write(folder))
