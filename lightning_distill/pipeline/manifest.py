"""What of a stage is done, and from what: the file ``manifest.json`` in its folder.

It holds the stage's ``configuration``, the hashes of the ``earlier`` networks that it learns from, whether it is
``finished`` and, if so, ``weights`` (the hash of the exported network), the metrics and the costs. The first process of
the stage writes it, whole.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_distill.files import changes_between, read_json, write_json

MANIFEST = "manifest.json"
VERSION = 1
FOLLOWED = "followed"
"""In the place of the hash of a network that was still being trained."""


def read_manifest(where: Path) -> dict[str, Any] | None:
    """What is known of the stage in the folder ``where``; ``None`` if it was not begun.

    Raises:
        ValueError: If the file cannot be read, or is of another version.
    """
    path = where / MANIFEST
    if not path.exists():
        return None
    try:
        record: dict[str, Any] = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}). Restore it, or move the folder {where} away.") from error
    if record.get("version") != VERSION:
        raise ValueError(
            f"{path} has the version {record.get('version')}, expected {VERSION}. Move the folder {where} away, or use "
            "the version of lightning-distill that wrote it."
        )
    return record


def finished_manifest(where: Path) -> dict[str, Any] | None:
    """What is known of the stage in ``where``, if it is finished."""
    record = read_manifest(where)
    return record if record is not None and record["finished"] else None


def check_manifest(where: Path, stage: str, configuration: Mapping[str, Any], earlier: Mapping[str, str]) -> None:
    """Refuse to go on with a stage that was begun with another configuration, or from other networks.

    Raises:
        ValueError: If so; the message names the stage and what differs.
    """
    record = read_manifest(where)
    if record is None:
        return
    fix = f"Train it and what follows anew with `start_stage={stage!r}`, or choose another folder."
    if changes := list(changes_between(record["configuration"], plain(configuration))):
        raise ValueError(
            f"The stage {stage!r} in {where.parent} was trained with another configuration: {'; '.join(changes)}. {fix}"
        )
    known = record["earlier"]
    other = [name for name in {**known, **earlier} if not _same(known.get(name), earlier.get(name))]
    if other:
        raise ValueError(
            f"The stage {stage!r} in {where.parent} learnt from another network than the one that the stage "
            f"{other[0]!r} has now. {fix}"
        )


def begin_manifest(where: Path, configuration: Mapping[str, Any], earlier: Mapping[str, str]) -> None:
    """Write down that a stage is being trained."""
    record = {"version": VERSION, "finished": False, "configuration": plain(configuration), "earlier": dict(earlier)}
    write_json(where / MANIFEST, record)


def finish_manifest(where: Path, **facts: Any) -> None:
    """Write down that a stage is done, and what came of it."""
    write_json(where / MANIFEST, {**(read_manifest(where) or {}), **facts, "finished": True})


def plain(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """``configuration`` as JSON gives it back.

    Raises:
        TypeError: If JSON cannot hold it.
    """
    try:
        read: dict[str, Any] = json.loads(json.dumps(dict(configuration)))
    except TypeError as error:
        raise TypeError(f"`configuration` must consist of what JSON can hold: {error}.") from error
    return read


def _same(known: str | None, now: str | None) -> bool:
    return known == now or (known is not None and now is not None and FOLLOWED in (known, now))
