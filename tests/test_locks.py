"""A folder belongs to one process at a time, and to nobody after that process has died."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from lightning_distill import locks
from lightning_distill.locks import LOCK, OWNER, only_process

HOLD = """
import os, sys, time
from pathlib import Path
from lightning_distill.locks import only_process
with only_process(Path(sys.argv[1]), "pipeline"):
    own = os.getpid()
    if sys.argv[2] == "worker" and os.fork() == 0:
        while os.getppid() == own:  # as the workers of a data loader look after their process
            time.sleep(0.3)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder, kind="alone"):
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder, kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["alone", "worker"])
def test_another_process_is_refused_until_the_first_has_died(tmp_path, kind):
    folder = tmp_path / "run"
    with holder(folder, kind) as process:
        try:
            with (
                pytest.raises(
                    BlockingIOError,
                    match=rf"The pipeline in \S+run is in use by the process {process.pid}\. Wait .* another folder",
                ),
                only_process(folder, "pipeline"),
            ):
                pass
            assert (folder / OWNER).exists()  # the one that was refused leaves the owner's word alone
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            with only_process(folder, "pipeline"):
                assert (folder / OWNER).read_text() == f"{os.getpid()} {platform.node()}"
        finally:
            process.kill()
    assert not (folder / OWNER).exists()


def test_it_is_free_after_its_time_and_after_an_error(tmp_path):
    with (
        pytest.raises(BlockingIOError, match=f"in use by the process {os.getpid()}"),
        only_process(tmp_path, "comparison"),
        only_process(tmp_path, "comparison"),
    ):
        pass
    with only_process(tmp_path, "comparison"):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / OWNER).exists()


@pytest.mark.parametrize(
    ("owner", "named"),
    [(None, "another process"), ("half", "another process"), ("7 elsewhere", "the process 7 on elsewhere")],
)
def test_who_cannot_be_seen_is_taken_to_live(tmp_path, monkeypatch, owner, named):
    monkeypatch.setattr(locks, "WORKERS_END", "not waited for")
    with only_process(tmp_path, "comparison"):
        if owner is None:
            (tmp_path / OWNER).unlink()
        else:
            (tmp_path / OWNER).write_text(owner)
        with pytest.raises(BlockingIOError, match=f"is in use by {named}\\."), only_process(tmp_path, "comparison"):
            pass


def test_what_a_killed_process_has_left_running_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "WORKERS_END", 0.2)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    waited = []
    acquire = locks.FileLock.acquire
    monkeypatch.setattr(
        locks.FileLock, "acquire", lambda self, timeout: waited.append(timeout) or acquire(self, timeout)
    )
    with only_process(tmp_path, "pipeline"):
        (tmp_path / OWNER).write_text(f"{gone.pid} {platform.node()}")
        with pytest.raises(BlockingIOError, match=f"the process {gone.pid}"), only_process(tmp_path, "pipeline"):
            pass
    assert waited == [0, 0, 0.2]
