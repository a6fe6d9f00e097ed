"""Trainings that learn from their own past resume exactly after a kill, and agree between processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("self_distillation_run.py")
NEVER = 10**6
METHODS = ["born_again", "born_again_best", "mean_teacher", "snapshots", "refinement"]


def run(folder, method, devices, kill_at):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, SCRIPT, folder, method, str(devices), str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_equal(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, (tuple, list)):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_resumes_exactly(tmp_path, method, devices):
    straight = run(tmp_path / "straight", method, devices, NEVER)
    assert straight.returncode == 0, straight.stderr
    # 10 steps an epoch, a checkpoint every 2: in the middle of the second epoch; and, from what that one left,
    # in the third one's first step, so that it goes on from the very end of the second
    for kill_at in (15, 19 if method == "born_again_best" else 21):
        killed = run(tmp_path / "killed", method, devices, kill_at)
        assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    resumed = run(tmp_path / "killed", method, devices, NEVER)
    assert resumed.returncode == 0, resumed.stderr
    finals = [torch.load(tmp_path / "straight" / f"final-{rank}.pt") for rank in range(devices)]
    for rank, expected in enumerate(finals):
        assert expected["steps"] == 30
        assert_equal(torch.load(tmp_path / "killed" / f"final-{rank}.pt"), expected)
    if devices == 2:  # running statistics are each process's own until the next step, as always under DDP
        first, second = ({k: v for k, v in final["module"].items() if "running" not in k} for final in finals)
        assert_equal(first, second)
