"""Pipelines described in YAML."""

import json

import pytest
import yaml

from lightning_distill.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI with jsonargparse 4.53
STAGES = "lightning_distill.stages"
NET = "lightning_distill.networks.ConvNet1d"
CONFIGURATION = {
    "folder": "runs/p",
    "common": {
        "model": {
            "class_path": "ProgressiveStage",
            "init_args": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.01}}},
        },
        "data": {
            "class_path": "MNIST1DDataModule",
            "init_args": {"num_labels": 200, "unlabelled": False, "batch_size": 50},
        },
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False},
    },
    "stages": {
        "teacher": {
            "model": {
                "class_path": "KD",
                "init_args": {"alpha": 1.0, "student": {"class_path": NET, "init_args": {"widths": [8, 8]}}},
            }
        },
        "same again": {
            "model": {"init_args": {"student": {"class_path": f"{STAGES}.stage_network"}}},
            "monitor": "val/nll",
            "mode": "min",
        },
        "features": {
            "model": {
                "class_path": "FeatureKD",
                "init_args": {
                    "student": {"class_path": NET, "init_args": {"widths": [4, 4]}},
                    "teacher": {"class_path": f"{STAGES}.stage_network", "init_args": {"stage": "teacher"}},
                    "pairs": {"blocks.1": "blocks.1"},
                },
            }
        },
    },
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(configuration):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(configuration, sort_keys=False))
        return ["pipeline", "-c", "p.yaml"]

    return write


def test_stages_of_any_module_take_networks_of_the_ones_before(file, tmp_path, capsys):
    main(file(CONFIGURATION))
    said = capsys.readouterr().out
    assert "same again: training" in said
    names = ["teacher", "same-again", "features"]
    stages = {name: json.loads((tmp_path / "runs/p" / name / "manifest.json").read_text()) for name in names}
    assert all(stage["finished"] for stage in stages.values())
    assert stages["same-again"]["metric"] == stages["same-again"]["metrics"]["val/nll"]
    assert stages["teacher"]["parameters"] == stages["same-again"]["parameters"] > stages["features"]["parameters"]
    main(["pipeline", "-c", "p.yaml", "--start_stage", "features"])
    assert (tmp_path / "runs/p/features.replaced-1").is_dir()
    assert "teacher: training" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {}}, "`stages` is empty"),
        ({"stages": {"a": {"modl": {}}}}, r"The stage 'a' has the keys \['modl'\]; expected model, data, trainer"),
        (
            {"stages": {"a": {"model": {"init_args": {"transfer": "some"}}}}},
            "The configuration of the stage 'a' is not",
        ),
        ({"stages": {"a": {"monitor": "val/nll", "mode": "least"}}}, "the stage 'a'"),
    ],
)
def test_refuses(file, tmp_path, change, message):
    with pytest.raises(SystemExit, match=message):
        main(file(CONFIGURATION | change))
    assert not (tmp_path / "runs").exists()


def test_a_changed_stage_is_refused(file, tmp_path):
    only = {"teacher": CONFIGURATION["stages"]["teacher"]}
    main(file(CONFIGURATION | {"stages": only}))
    common = CONFIGURATION["common"] | {"trainer": {**CONFIGURATION["common"]["trainer"], "max_epochs": 2}}
    arguments = file(CONFIGURATION | {"stages": only, "common": common})
    with pytest.raises(SystemExit, match=r"'teacher' .* another configuration: `trainer.max_epochs` was 1, is 2"):
        main(arguments)


def test_layers_are_kept_by_what_yaml_says_to_measure(file, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {i}: {i * i} and {i + 7}." * 3 for i in range(200)))
    text = {"class_path": "TextDataModule", "init_args": {"files": ["text.txt"], "length": 16, "batch_size": 4}}
    sizes = {"vocab_size": 512, "n_positions": 32, "n_embd": 8, "n_layer": 3, "n_head": 2}
    gpt = {"model_type": "gpt2", "head": "causal-lm", "config": sizes | {"bos_token_id": 0, "eos_token_id": 0}}
    kept = {"layers": 2, "by": "importance", "task": {"class_path": "CausalLM"}, "data": text}
    teacher = {"class_path": "lightning_distill.networks.from_config", "init_args": gpt}
    common = {
        "model": {"class_path": "ProgressiveStage", "init_args": {"task": {"class_path": "CausalLM"}}},
        "data": text,
        "trainer": {"accelerator": "cpu", "max_steps": 2, "max_epochs": -1, "enable_progress_bar": False},
    }
    common["trainer"] |= {"val_check_interval": 1, "limit_val_batches": 1, "limit_test_batches": 1}
    alone = {"alpha": 1.0, "student": teacher, "task": {"class_path": "CausalLM"}}
    stages = {
        "teacher": {"model": {"class_path": "KD", "init_args": alone}},
        "student": {"model": {"init_args": {"student": {"class_path": f"{STAGES}.shortened", "init_args": kept}}}},
    }
    arguments = file({"folder": "runs/p", "monitor": "val/nll", "mode": "min", "common": common, "stages": stages})
    main(arguments)
    report = json.loads((tmp_path / "runs/p/report.json").read_text())
    large, small = (stage["parameters"] for stage in report["stages"])
    layer = 12 * 8 * 8 + 13 * 8
    assert large - small == layer
    main(arguments)  # finished: built again, trained no more
