"""Pipelines that are killed, and pipelines of several processes, run as users run them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("pipeline_run.py")
ROOT = SCRIPT.parents[2]


def run(folder, devices, kill_in="", kill_at=-1, launcher=(sys.executable,)):
    folder.mkdir(exist_ok=True)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [*launcher, str(SCRIPT), str(folder), str(devices), kill_in, str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )


def networks(folder):
    return {name: load_file(folder / "run" / name / "student.safetensors") for name in ("teacher", "assistant", "last")}


def assert_same(first, second):
    for stage, weights in networks(first).items():
        for name, value in networks(second)[stage].items():
            assert torch.equal(value, weights[name]), (stage, name)


def steps(folder, rank=0):
    return (folder / f"steps-{rank}.txt").read_text().split("\n")[:-1]


@pytest.mark.chapter("C18", api="lightning_distill.Pipeline")
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_stage_it_ends_as_if_nothing_had_happened(tmp_path, devices):
    straight = run(tmp_path / "straight", devices)
    assert straight.returncode == 0, straight.stderr
    per_stage = 10 if devices == 1 else 6  # in two epochs
    assert len(steps(tmp_path / "straight")) == 3 * per_stage
    at = 7 if devices == 1 else 5
    killed = run(tmp_path / "killed", devices, "assistant", at)
    assert killed.returncode in (-signal.SIGKILL, 1), killed.stderr
    stages = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "killed" / "run").glob("*/manifest.json")}
    assert {name: stage["finished"] for name, stage in stages.items()} == {"teacher": True, "assistant": False}
    resumed = run(tmp_path / "killed", devices)
    assert resumed.returncode == 0, resumed.stderr
    assert_same(tmp_path / "straight", tmp_path / "killed")
    again = steps(tmp_path / "killed")[per_stage + at :]
    assert again[0] == ("assistant 7" if devices == 1 else "assistant 5")  # after the checkpoint at step 6, or 4
    assert not any(step.startswith("teacher") for step in again)
    reported = {line for text in (straight.stdout, resumed.stdout) for line in text.split("\n") if "RANK" in line}
    assert len({line.split(" ", 2)[2] for line in reported}) == 1
    assert len(reported) == devices


@pytest.mark.slow
def test_two_processes_by_the_trainer_or_by_torchrun_are_the_same(tmp_path):
    by_trainer = run(tmp_path / "trainer", 2)
    assert by_trainer.returncode == 0, by_trainer.stderr
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    by_torchrun = run(tmp_path / "torchrun", 2, launcher=torchrun)
    assert by_torchrun.returncode == 0, by_torchrun.stderr
    assert_same(tmp_path / "trainer", tmp_path / "torchrun")
    assert steps(tmp_path / "torchrun", 1) == steps(tmp_path / "trainer", 0)
    finished = run(tmp_path / "torchrun", 2, launcher=torchrun)
    assert finished.returncode == 0, finished.stderr
    assert len(steps(tmp_path / "torchrun")) == 18


@pytest.mark.slow
def test_one_process_more_in_a_later_stage_is_refused(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    found = run(tmp_path / "run", 1, launcher=torchrun)
    assert found.returncode != 0
    assert "asks for 1 processes, but 2 are running" in found.stderr


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_second_pipeline_in_the_folder_is_refused_while_the_first_runs(tmp_path, devices):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    first = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(tmp_path), str(devices), "", "-1"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stderr=subprocess.PIPE,
        text=True,
    )
    while first.poll() is None and not (tmp_path / "steps-0.txt").exists():
        time.sleep(0.1)
    first.send_signal(signal.SIGSTOP)  # in the middle of its first stage, for as long as it takes
    try:
        second = run(tmp_path, devices)
    finally:
        first.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert f"BlockingIOError: The pipeline in {tmp_path / 'run'} is in use by the process {first.pid}." in second.stderr
    _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert len(steps(tmp_path)) == (30 if devices == 1 else 18)  # nobody else has trained
    finished = run(tmp_path, devices)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_all_processes_go_on_with_what_the_first_one_wrote(tmp_path, kind):
    """Each has other statistics of batch normalization, and without validation no checkpoint makes them alike; of a
    network that is spread only the first one gets the weights."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, SCRIPT.with_name("statistics_run.py"), tmp_path, kind],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = load_file(tmp_path / "run" / "teacher" / "student.safetensors")
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"teacher-{rank}.pt").items():
            assert torch.equal(value, written[name]), (rank, name)
