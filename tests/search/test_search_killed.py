"""A search that is killed goes on where it was; two processes share one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from lightning_distill.files import read_json

SCRIPT = Path(__file__).with_name("problem.py")


def start(folder, *, kill_at=0, pause=0.0, trials=6):
    command = [sys.executable, "-m", "tests.search.problem", folder, str(kill_at), str(pause), str(trials)]
    return subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, expected=0):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == expected, errors


def trials(folder):
    stored = read_json(folder / "search" / "results.json")["trials"]
    return [(t["number"], t["state"], t["settings"], t["values"]) for t in stored]


def epochs(folder):
    """How often each epoch of each setting was trained."""
    lines = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    return Counter((line["lr"], line["momentum"], line["epoch"]) for line in lines)


@pytest.mark.slow
def test_a_killed_search_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    finish(start(tmp_path / "straight"))
    finish(start(tmp_path / "killed", kill_at=3), -signal.SIGKILL)
    assert [state for _, state, *_ in trials(tmp_path / "killed")] == ["complete"] * 2
    finish(start(tmp_path / "killed"))
    assert trials(tmp_path / "killed") == trials(tmp_path / "straight")
    assert len(trials(tmp_path / "killed")) == 6
    # the third trial went on after its second epoch, and none was trained twice
    assert epochs(tmp_path / "killed") == epochs(tmp_path / "straight")
    assert set(epochs(tmp_path / "killed").values()) == {1}
    assert not list((tmp_path / "killed").rglob("*.ckpt"))
    # more trials can be asked for later
    finish(start(tmp_path / "killed", trials=8))
    more = trials(tmp_path / "killed")
    assert more[:6] == trials(tmp_path / "straight")
    assert len(more) == 8


@pytest.mark.slow
def test_two_processes_share_the_trials_and_one_takes_over_from_the_other(tmp_path):
    folder = tmp_path / "shared"
    both = [start(folder, pause=0.3, trials=8) for _ in range(2)]
    while not (folder / "epochs.jsonl").exists() or len(epochs(folder)) < 5:
        assert all(process.poll() is None for process in both)
        time.sleep(0.05)
    both[1].kill()  # in a trial
    both[1].communicate()
    finish(both[0])
    stored = trials(folder)
    assert [number for number, *_ in stored] == list(range(8))
    assert all(state in ("complete", "pruned") for _, state, *_ in stored)
    assert len({(s["lr"], s["momentum"]) for _, _, s, _ in stored}) == 8
    counts = epochs(folder)
    complete = [s for _, state, s, _ in stored if state == "complete"]
    assert all(counts[s["lr"], s["momentum"], epoch] >= 1 for s in complete for epoch in range(4))
    # at most the epoch that the dead process was in was trained again
    assert sum(count - 1 for count in counts.values()) <= 1
