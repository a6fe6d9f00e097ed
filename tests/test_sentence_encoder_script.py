"""The script that halves a sentence encoder, run as a user does, on a small encoder in a folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_distill.datamodules.text import train_tokenizer
from lightning_distill.networks import from_config

SCRIPT = Path(__file__).parent.parent / "scripts" / "sentence_encoder.py"


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 4}
    from_config("bert", "encoder", small | {"vocab_size": 300}).save_pretrained(tmp_path)
    train_tokenizer(["some words", "to train on"], 300).save_pretrained(tmp_path)
    command = [sys.executable, SCRIPT, "--encoder", tmp_path, "--layers", "2", "--sentences", "32", "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 layers learn from 4" in done.stdout
    before, after = map(float, re.search(r"Spearman: (\S+) before, (\S+) after", done.stdout).groups())
    assert -1 <= before <= 1
    assert -1 <= after <= 1
    assert re.search(r"teacher \d+, student \d+ \(\d+\.\d\d times\)", done.stdout)
