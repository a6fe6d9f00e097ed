"""Fixtures that every test may use."""

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
GOLDEN = Path(__file__).parent / "golden"


@functools.cache
def golden_cases():
    """All cases of tests/golden, by name: numbers that another program computed."""
    cases = {}
    for path in sorted(GOLDEN.glob("*.json")):
        for name, case in json.loads(path.read_text()).items():
            assert name not in cases, f"the golden case {name} is in two files"
            cases[name] = case
    return cases


def _tensors(value):
    """Numbers as float64 tensors, everything else as it is."""
    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    if isinstance(value, list):
        try:
            return torch.tensor(value, dtype=torch.float64)
        except (TypeError, ValueError):
            return value
    return value


@pytest.fixture
def golden():
    """``golden(name)`` gives a case with ``inputs``, ``expected`` (lists as float64 tensors), ``rtol`` and ``atol``."""

    def case(name):
        found = golden_cases()[name]
        return SimpleNamespace(
            inputs=_tensors(found["inputs"]),
            expected=_tensors(found["expected"]),
            rtol=found["tolerance"]["rtol"],
            atol=found["tolerance"]["atol"],
        )

    return case


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for every test, and for the processes that it starts, whatever ran before."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seed_everything leaves them behind
        os.environ.pop(name, None)
    torch.manual_seed(0)


@pytest.fixture
def make_trainer(tmp_path):
    """A quiet Trainer on the CPU that writes into the test's folder."""

    def make(**arguments):
        quiet = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**(quiet | arguments))

    return make
