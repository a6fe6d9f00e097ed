"""Files that are whole or not there, and what differs between two of them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def draft_of(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to; what is there takes the place of ``path`` after this context, and vanishes after an error.

    Raises:
        FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists. Choose another path, or pass `overwrite=True`.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        draft = Path(folder) / path.name
        yield draft
        os.replace(draft, path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that a reader sees the old file or the new one; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_finite(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names; hexadecimal."""
    digest = hashlib.sha256()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def changes_between(
    before: Any, after: Any, path: tuple[str, ...] = (), *, open_ended: tuple[str, ...] | None = None
) -> Iterator[str]:
    """Readable differences between two JSON values.

    Args:
        before: A JSON value.
        after: Another one.
        path: Keys that lead to them, for the text.
        open_ended: Path of a mapping in which an entry more or less is no difference.
    """
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in [*before, *(key for key in after if key not in before)]:
            if path == open_ended and (key not in before or key not in after):
                continue  # a method more or less leaves the runs of the others as they are
            yield from changes_between(
                before.get(key, _MISSING), after.get(key, _MISSING), (*path, key), open_ended=open_ended
            )
    elif before != after:
        yield f"`{'.'.join(path)}` was {_shown(before)}, is {_shown(after)}"


_MISSING = object()


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "missing"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
