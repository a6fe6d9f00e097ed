"""Selection rules and adapting callbacks from YAML, with their state in the checkpoint that the command line writes."""

import pytest
import torch
import yaml

from lightning_distill.cli import main
from tests.cli.test_trainer_commands import CONFIGURATION

pytestmark = pytest.mark.filterwarnings("ignore")  # the command line shows users whatever it has to warn of


def test_rules_and_callbacks_are_built_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = CONFIGURATION["model"]["init_args"]
    rule = {"class_path": "lightning_distill.selection.SelectByClass", "init_args": {"classes": 10, "q": 50}}
    callbacks = [
        {"class_path": "LogSelection"},
        {"class_path": "GradientVarianceTemperature", "init_args": {"micro_batches": 4}},
        {"class_path": "GradientAlignment", "init_args": {"every_n_steps": 2}},
        {"class_path": "TaskDifficulty", "init_args": {"beta": 0.0}},
    ]
    configuration = {
        **CONFIGURATION,
        "model": {**CONFIGURATION["model"], "init_args": {**model, "item_weights": {"soft": rule}}},
        "trainer": {
            **CONFIGURATION["trainer"],
            "callbacks": [*callbacks, *CONFIGURATION["trainer"]["callbacks"]],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "-c", "run.yaml"])
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["state_dict"]["item_rules.soft.histogram"].shape == (11, 512)
    assert checkpoint["state_dict"]["item_rules.soft.histogram"].sum() > 0
    states = {name.split("{")[0]: state for name, state in checkpoint["callbacks"].items()}
    assert 1 <= states["GradientVarianceTemperature"]["temperature"] <= 20
    assert -1 <= states["GradientAlignment"]["cosine"] <= 1
    assert 0 <= states["TaskDifficulty"]["difficulty"] <= 1
