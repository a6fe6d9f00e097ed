"""A training from a pool of teachers: killed and resumed, it ends as if nothing had happened; in two processes, too."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("pool_run.py")
NEVER = 10**6


def run(folder, kind, devices, kill_at):
    folder.mkdir(exist_ok=True)
    root = str(SCRIPT.parents[2])
    return subprocess.run(
        [sys.executable, SCRIPT, folder, kind, str(devices), str(kill_at)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def equal(first, second):
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "devices"), [("cached", 1), ("cached", 2), ("router", 1), ("router", 2), ("difficulty", 2)]
)
def test_a_killed_run_resumes_exactly(tmp_path, kind, devices):
    straight = run(tmp_path / "straight", kind, devices, NEVER)
    assert straight.returncode == 0, straight.stderr
    killed = run(tmp_path / "killed", kind, devices, 15)  # 10 steps an epoch, a checkpoint every 2
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    resumed = run(tmp_path / "killed", kind, devices, NEVER)
    assert resumed.returncode == 0, resumed.stderr
    finals = []
    for rank in range(devices):
        expected = torch.load(tmp_path / "straight" / f"final-{rank}.pt")
        found = torch.load(tmp_path / "killed" / f"final-{rank}.pt")
        finals.append(found)
        assert found["steps"] == expected["steps"] == 30
        assert found["thresholds"] == expected["thresholds"]
        assert bool(found["choice"]) == (kind != "difficulty")
        for part in ("student", "choice"):
            for name, value in expected[part].items():
                assert equal(found[part][name], value), name
    if kind == "difficulty":
        assert finals[0]["thresholds"][-1] > 0.6  # it has moved
    for part in ("student", "choice"):  # and is the same in all processes
        for name, value in finals[0][part].items():
            assert equal(finals[-1][part][name], value), name
    if kind == "cached":
        assert (finals[0]["choice"]["uses"] > 0).all()  # also of the samples that another process had


@pytest.mark.slow
def test_the_log_of_two_processes_is_that_of_one(tmp_path):
    for devices in (1, 2):
        done = run(tmp_path / str(devices), "log", devices, NEVER)
        assert done.returncode == 0, done.stderr
    expected = torch.load(tmp_path / "1" / "final-0.pt")["log"]
    assert expected["pool/runs/t0"] == 1
    assert 0 < expected["pool/share/t1"] < 1
    for rank in range(2):
        assert torch.load(tmp_path / "2" / f"final-{rank}.pt")["log"] == pytest.approx(expected)
