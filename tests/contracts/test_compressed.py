"""Students that were pruned, factorized, repaired or made sparse: in micro-batches, in two processes, after a kill."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.contracts.compressed_run import COMPRESSIONS, NETWORKS, run

SCRIPT = Path(__file__).with_name("compressed_run.py")
NEVER = 10**6


def start(folder, devices, kill_at, kinds):
    root = str(SCRIPT.parents[2])
    return subprocess.run(
        [sys.executable, SCRIPT, folder, str(devices), str(kill_at), *kinds],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def final(folder, kind, rank=0):
    return torch.load(folder / kind / f"final-{rank}.pt", weights_only=False)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, equal_nan=True, msg=name)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_micro_batches_change_nothing(tmp_path, compression):
    whole, parts = f"{compression}-mlp", f"{compression}-mlp@2"
    for kind in (whole, parts):
        (tmp_path / kind).mkdir()
        run(kind, tmp_path / kind, 1, NEVER)
    expected, found = final(tmp_path, whole), final(tmp_path, parts)
    assert found["chosen"] == expected["chosen"]
    assert_close(found["kept"], expected["kept"], 0.0)
    assert_close(found["after"], expected["after"], 1e-5)
    moved = [not torch.equal(value, expected["before"][name]) for name, value in expected["after"].items()]
    assert any(moved)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """All kinds by one process and by two."""
    folders = {}
    kinds = [f"{compression}-{network}" for compression in COMPRESSIONS for network in NETWORKS]
    for devices in (1, 2):
        folders[devices] = tmp_path_factory.mktemp(f"straight-{devices}")
        done = start(folders[devices], devices, NEVER, kinds)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_two_processes_choose_and_learn_the_same(straight, compression, network):
    kind = f"{compression}-{network}"
    first, second, alone = final(straight[2], kind), final(straight[2], kind, 1), final(straight[1], kind)
    assert first["chosen"] == second["chosen"] == alone["chosen"]
    for others in (second, alone):
        assert_close(others["before"], first["before"], 0.0)
    assert_close(second["kept"], first["kept"], 0.0)
    statistics = {name for name in first["after"] if name.rpartition(".")[2].startswith("running_")}
    assert bool(statistics) == (network == "resnet")
    learnt = [name for name in first["after"] if name not in statistics]
    for name in learnt:  # each process has the statistics of its own last batch
        assert torch.equal(first["after"][name], second["after"][name]), name
    if network == "mlp":  # batch normalization sees the samples of its own process alone
        assert_close(first["kept"], alone["kept"], 0.0)
        assert_close(first["after"], alone["after"], 1e-5)
    written = load_file(straight[2] / kind / "student.safetensors")
    assert all(torch.equal(written[name], first["after"][name]) for name in written if name in first["after"])


KILLED = [("low_rank-resnet@4", 1), ("adapter-resnet@4", 1), ("pruned-resnet", 2), ("low_rank-resnet", 2)]
KILLED += [("recovered-resnet", 2), ("sparse-resnet", 2)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "devices"), KILLED)
def test_a_killed_run_resumes_exactly(tmp_path, kind, devices):
    """Also in the middle of an accumulation, whose micro-batches are then seen again."""
    straight = start(tmp_path / "straight", devices, NEVER, [kind])
    assert straight.returncode == 0, straight.stderr
    killed = start(tmp_path / "killed", devices, 13, [kind])  # in the second epoch, one step after a checkpoint
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    assert not list((tmp_path / "killed").rglob("final-*.pt"))
    resumed = start(tmp_path / "killed", devices, NEVER, [kind])
    assert resumed.returncode == 0, resumed.stderr
    for rank in range(devices):
        expected, found = (final(tmp_path / run, kind, rank) for run in ("straight", "killed"))
        assert found["chosen"] == expected["chosen"]
        assert found["steps"] == expected["steps"] == 20
        for part in ("before", "after", "kept"):
            assert_close(found[part], expected[part], 0.0)
