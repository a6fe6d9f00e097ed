"""fit, validate, test and predict from YAML, and what their checkpoints can do."""

import pytest
import torch
import yaml

from lightning_distill import KD
from lightning_distill.cli import main
from lightning_distill.outputs import Step

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line shows users whatever it has to warn of

CONFIGURATION = {
    "model": {
        "class_path": "KD",
        "init_args": {
            "alpha": 0.5,
            "student": {"class_path": "lightning_distill.networks.MLP", "init_args": {"sizes": [64, 8, 10]}},
            "teacher": {"class_path": "lightning_distill.networks.MLP", "init_args": {"sizes": [64, 32, 10]}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "terms": {"dist": {"class_path": "DIST"}},
            "weights": {"dist": 0.1},
        },
    },
    "data": {"class_path": "DigitsDataModule", "init_args": {"num_labels": 100}},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "checkpoints", "save_last": True},
            }
        ],
    },
}


@pytest.fixture
def fitted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(CONFIGURATION))
    main(["fit", "-c", "kd.yaml", "--model.temperature", "2"])
    return tmp_path / "checkpoints" / "last.ckpt"


def test_a_checkpoint_from_yaml_rebuilds_student_and_teacher(fitted):
    module = KD.load_from_checkpoint(fitted, weights_only=True)
    assert module.temperature == 2.0
    assert module.weighting.weights() == {"hard": 0.5, "soft": 0.5, "dist": 0.1}
    assert module.teacher.network.blocks[0][0].out_features == 32
    checkpoint = torch.load(fitted, weights_only=True)
    assert all(name.startswith("student.") for name in checkpoint["state_dict"])


@pytest.mark.parametrize("command", ["validate", "test"])
def test_measure_a_checkpoint(fitted, command, capsys):
    main([command, "-c", "kd.yaml", "--ckpt_path", str(fitted)])
    said = capsys.readouterr().out
    for name in ("accuracy", "agreement", "fidelity", "ece", "nll"):
        assert name in said


def test_help_lists_the_commands(capsys):
    main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("fit", "validate", "test", "predict", "compare"))
    main([])
    assert capsys.readouterr().out == said


def test_rules_transforms_and_terms_can_be_named_in_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = CONFIGURATION["model"]["init_args"] | {
        "temperature": {"class_path": "lightning_distill.temperature.EntropyTemperature", "init_args": {"tau0": 3}},
        "batch_transform": {"class_path": "lightning_distill.losses.Mixup", "init_args": {"num_classes": 10}},
        "item_weights": {"soft": {"class_path": "tests.cli.test_trainer_commands.Half"}},
    }
    configuration = CONFIGURATION | {"model": {"class_path": "KD", "init_args": arguments}}
    (tmp_path / "kd.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "-c", "kd.yaml"])
    module = KD.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert module.temperature.tau0 == 3
    assert module.batch_transform.num_classes == 10


class Half:
    """Weighs every item half."""

    def __call__(self, step: Step) -> float:
        return 0.5
