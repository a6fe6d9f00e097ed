"""A run that is killed in the middle of an epoch and resumed ends as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("resume_run.py")
NEVER = 10**6


def run(folder, devices, workers, kill_at):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, SCRIPT, folder, str(devices), str(workers), str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("devices", "workers"),
    [(1, 0), pytest.param(1, 2, marks=pytest.mark.slow), (2, 0), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_a_killed_run_resumes_exactly(tmp_path, devices, workers):
    straight = run(tmp_path / "straight", devices, workers, NEVER)
    assert straight.returncode == 0, straight.stderr
    # 10 steps an epoch, a checkpoint every 2: killed in the second epoch's middle, one step after a checkpoint
    killed = run(tmp_path / "killed", devices, workers, 15)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    assert not list((tmp_path / "killed").glob("final-*.pt"))
    resumed = run(tmp_path / "killed", devices, workers, NEVER)
    assert resumed.returncode == 0, resumed.stderr
    for rank in range(devices):
        expected = torch.load(tmp_path / "straight" / f"final-{rank}.pt")
        found = torch.load(tmp_path / "killed" / f"final-{rank}.pt")
        assert found["steps"] == expected["steps"] == 30
        assert found["temperature"] == expected["temperature"]
        for name, value in expected["student"].items():
            assert torch.equal(found["student"][name], value), name
