"""The gradient of an optimizer step is the same for every split into micro-batches and processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.contracts.gradient_run import KINDS, gradient

SCRIPT = Path(__file__).with_name("gradient_run.py")


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_do_not_change_the_gradient(tmp_path, kind):
    whole = gradient(kind, 1, 32, 1, tmp_path)
    assert whole.norm() > 1e-3
    for split in [(8, 4), (4, 8), (12, 3), (24, 2), (4, 16)]:
        assert (gradient(kind, 1, *split, tmp_path) - whole).norm() <= 1e-5 * whole.norm(), split


def test_two_processes_do_not_change_the_gradient(tmp_path):
    splits = ["16x1", "4x4", "2x8", "6x3"]
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, *splits],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        found = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert len(found) == len(KINDS) * len(splits)
        for (kind, *split), value in found.items():
            whole = gradient(kind, 1, 32, 1, tmp_path)
            assert (value - whole).norm() <= 1e-5 * whole.norm(), (kind, split)
