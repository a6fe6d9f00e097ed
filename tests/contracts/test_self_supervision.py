"""Deep supervision and stochastic depth: killed and resumed, with one process and with two, as if never interrupted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("self_supervision_run.py")
NEVER = 10**6


def run(folder, kind, devices, kill_at):
    folder.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, SCRIPT, folder, kind, str(devices), str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def final(folder, devices):
    return [torch.load(folder / f"final-{rank}.pt") for rank in range(devices)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "depth"])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_killed_run_resumes_exactly(tmp_path, kind, devices):
    straight = run(tmp_path / "straight", kind, devices, NEVER)
    assert straight.returncode == 0, straight.stderr
    killed = run(tmp_path / "killed", kind, devices, 15)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    assert not list((tmp_path / "killed").glob("final-*.pt"))
    resumed = run(tmp_path / "killed", kind, devices, NEVER)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = final(tmp_path / "straight", devices), final(tmp_path / "killed", devices)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["weights"] == theirs["weights"]
        assert ours["tensors"].keys() == theirs["tensors"].keys()
        for name, value in theirs["tensors"].items():
            assert torch.equal(ours["tensors"][name], value), name
    learned = [
        name for name, value in expected[0]["tensors"].items() if value.is_floating_point() and "running" not in name
    ]
    for name in learned:  # the processes agree
        assert all(torch.equal(expected[0]["tensors"][name], other["tensors"][name]) for other in expected), name
    if kind == "heads":
        assert expected[0]["weights"] != [0.5, 0.5]
        assert all(other["weights"] == expected[0]["weights"] for other in expected)
