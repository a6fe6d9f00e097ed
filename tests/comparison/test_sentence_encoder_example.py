"""The example on a pretrained sentence encoder, with a small random one in its place."""

from pathlib import Path

import pytest
import yaml

from lightning_distill.cli import main
from lightning_distill.comparison import Comparison

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentence_encoder.yaml"
SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 6}
ENCODER = {
    "class_path": "lightning_distill.networks.from_config",
    "init_args": {"model_type": "bert", "head": "encoder", "config": SMALL | {"vocab_size": 1000}},
}


def replaced(value):
    """The same configuration without the package."""
    if isinstance(value, list):
        return [replaced(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_path", "").endswith("load_encoder"):
        return ENCODER
    changed = {key: replaced(item) for key, item in value.items()}
    if isinstance(value.get("teacher"), str):
        changed["teacher"] = ENCODER
    if "tokenizer" in value:
        changed["tokenizer"] = None
    return changed


@pytest.mark.filterwarnings("ignore")  # the command line shows users whatever it has to warn of
def test_the_example_runs_from_its_file(tmp_path, capsys):
    configuration = replaced(yaml.safe_load(EXAMPLE.read_text()))
    for part in [configuration["common"], *configuration["methods"].values()]:
        if "trainer" in part:
            part["trainer"]["max_steps"] = min(2, part["trainer"]["max_steps"])
    configuration["common"]["data"]["init_args"].update(train_size=40, eval_size=20)
    configuration |= {"seeds": 2, "folder": str(tmp_path / "run")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(configuration))
    main(["compare", "-c", str(tmp_path / "small.yaml"), "--wandb", "off"])
    comparison = Comparison.load(tmp_path / "run")
    assert comparison.methods[0] == "embeddings only"
    assert len(comparison.runs) == 2 * 4
    assert all(-1 <= run["test/spearman"] <= 1 for run in comparison.runs)
    steps = {run["method"]: run["steps"] for run in comparison.runs}
    assert steps["not trained"] == 1
    features = [run for run in comparison.runs if run["method"] == "and attention maps"]
    assert all(run["test/features"] > 0 and run["test/attention"] > 0 for run in features)
