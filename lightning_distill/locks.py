"""One process at a time in a folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

LOCK, OWNER = "running.lock", "running.txt"
WORKERS_END = 10.0
"""Seconds in which the workers of a data loader end after their process was killed; torch lets them look every five."""


@contextmanager
def only_process(folder: Path, what: str) -> Iterator[None]:
    """Be the only process that writes into ``folder``, or refuse: two that do spoil what the other has written.

    The operating system gives the folder free when the process ends, however it ends.

    Args:
        folder: Made if it is not there. The file of the lock stays in it.
        what: What is done there, for the message: ``"pipeline"``.

    Raises:
        BlockingIOError: If another process, or this one, is at it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner, lives = _owner(folder)
        try:
            # Workers of a process that was killed were forked from it, and may hold what it held for a moment.
            lock.acquire(timeout=0 if lives else WORKERS_END)
        except Timeout:
            raise BlockingIOError(
                f"The {what} in {folder} is in use by {owner}. Wait until that is done, or end it first; what it has "
                "finished stays. Or choose another folder."
            ) from None
    try:
        (folder / OWNER).write_text(f"{os.getpid()} {platform.node()}", encoding="utf-8")
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> tuple[str, bool]:
    """Who is at it, in words, and whether that process lives, as far as can be seen."""
    try:
        number, _, machine = (folder / OWNER).read_text(encoding="utf-8").partition(" ")
        process = int(number)
    except (OSError, ValueError):  # it has only just begun
        return "another process", True
    if machine != platform.node():
        return f"the process {process} on {machine}", True
    return f"the process {process}", _lives(process)


def _lives(process: int) -> bool:
    if os.name == "nt":  # where there is no harmless signal
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


__all__ = ["only_process"]
