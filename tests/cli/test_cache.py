"""``lightning-distill cache`` and a training from what it wrote."""

from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

from lightning_distill.cli import main
from lightning_distill.teachers.cache import CacheReader

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI with jsonargparse 4.53

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist1d_cache.yaml"
QUIET = ["--trainer.enable_progress_bar=false"]
SHORT = [
    *QUIET,
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=3",
    "--trainer.limit_val_batches=1",
    "--trainer.logger=false",
    "--trainer.enable_model_summary=false",
]


class WithoutPrediction(L.LightningDataModule):
    """Has training data only."""


def weights(folder):
    (path,) = folder.rglob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state
    return state


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "cache"
    main(["cache", "-c", str(EXAMPLE), "--cache.folder", str(folder), "--cache.kind", "dense", *QUIET])
    return folder


def test_a_student_trains_from_the_cache_as_from_the_teacher(cached, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reader = CacheReader(cached)
    assert len(reader) == 4000
    assert reader.spec.width == 10
    from_cache = ["--model.teacher", "CachedTeacher", "--model.teacher.folder", str(cached)]
    main(["fit", "-c", str(EXAMPLE), *SHORT, f"--trainer.default_root_dir={tmp_path}/cached", *from_cache])
    main(["fit", "-c", str(EXAMPLE), *SHORT, f"--trainer.default_root_dir={tmp_path}/online"])
    online = weights(tmp_path / "online")
    for name, value in weights(tmp_path / "cached").items():
        torch.testing.assert_close(value, online[name], rtol=1e-4, atol=1e-5)


def test_running_it_again_says_what_is_there(cached, capsys):
    main(["cache", "-c", str(EXAMPLE), "--cache.folder", str(cached), "--cache.kind", "dense", *QUIET])
    said = " ".join(capsys.readouterr().out.split())
    assert "What the teacher says about 4000 samples is in" in said


def configuration(tmp_path, change):
    content = yaml.safe_load(EXAMPLE.read_text())
    change(content)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def refused(tmp_path, change, message):
    arguments = ["--cache.folder", str(tmp_path / "new"), "--cache.kind", "dense", *QUIET]
    with pytest.raises(SystemExit, match=message):
        main(["cache", "-c", configuration(tmp_path, change), *arguments])
    assert not (tmp_path / "new").exists()


def test_a_configuration_without_a_teacher_is_refused(tmp_path):
    refused(
        tmp_path, lambda c: c["model"]["init_args"].update(teacher=None), "error: the configuration's KD has no teacher"
    )


def test_a_cache_is_not_cached(cached, tmp_path):
    teacher = {"class_path": "CachedTeacher", "init_args": {"folder": str(cached)}}
    refused(
        tmp_path,
        lambda c: c["model"]["init_args"].update(teacher=teacher),
        "teacher is a cache already; give it the network",
    )


def test_data_without_a_prediction_loader_are_refused(tmp_path):
    boring = {"class_path": "tests.cli.test_cache.WithoutPrediction"}
    refused(tmp_path, lambda c: c.update(data=boring), "WithoutPrediction has no `predict_dataloader`; define one")


def test_another_teacher_does_not_go_into_the_same_folder(cached, tmp_path):
    arguments = ["--cache.folder", str(cached), "--cache.kind", "dense", "--seed_everything", "7", *QUIET]
    with pytest.raises(SystemExit, match="holds something else than was asked for: `teacher` is"):
        main(["cache", "-c", str(EXAMPLE), *arguments])


def test_what_fit_alone_reads_is_left_aside(cached, tmp_path, capsys):
    def change(content):
        content["ckpt_path"] = "somewhere.ckpt"
        content["trainer"]["callbacks"] = [{"class_path": "TemperatureAnnealing", "init_args": {"tau_max": 8}}]

    path = configuration(tmp_path, change)
    main(["cache", "-c", path, "--cache.folder", str(cached), "--cache.kind", "dense", *QUIET])
    assert "4000 samples" in " ".join(capsys.readouterr().out.split())
