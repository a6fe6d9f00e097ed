"""What of a pipeline is done, and from what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_distill.files import changes_between, read_json, write_json

MANIFEST = "manifest.json"
VERSION = 1


class Manifest:
    """The file ``manifest.json`` of a pipeline's folder.

    For each stage that was begun it holds its ``configuration``, the hashes of the ``earlier`` networks that it learns
    from, whether it is ``finished`` and, if so, ``weights`` (the hash of the exported network) and ``metrics``. The
    first process writes it, as a whole.

    Args:
        folder: Of the pipeline.

    Raises:
        ValueError: If the file cannot be read, or is of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MANIFEST
        self.content: dict[str, Any] = {"version": VERSION, "stages": {}}
        if self.path.exists():
            try:
                self.content = read_json(self.path)
            except ValueError as error:
                raise ValueError(
                    f"{self.path} cannot be read ({error}). Restore it, or start over in another folder."
                ) from error
            if self.content.get("version") != VERSION:
                raise ValueError(
                    f"{self.path} has the version {self.content.get('version')}, expected {VERSION}. Start over in "
                    "another folder, or use the version of lightning-distill that wrote it."
                )

    def record(self, stage: str) -> dict[str, Any] | None:
        """What is known of ``stage``; ``None`` if it was not begun."""
        record: dict[str, Any] | None = self.content["stages"].get(stage)
        return record

    def finished(self, stage: str) -> bool:
        """Whether ``stage`` is done."""
        record = self.record(stage)
        return record is not None and bool(record["finished"])

    def check(self, stage: str, configuration: Mapping[str, Any], earlier: Mapping[str, str]) -> None:
        """Refuse to go on with ``stage`` if it was begun with another configuration, or from other networks.

        Raises:
            ValueError: If so; the message names the stage and what differs.
        """
        record = self.record(stage)
        if record is None:
            return
        fix = f"Train it and what follows anew with `start_stage={stage!r}`, or choose another folder."
        changes = list(changes_between(record["configuration"], plain(configuration)))
        if changes:
            raise ValueError(
                f"The stage {stage!r} in {self.path.parent} was trained with another configuration: "
                f"{'; '.join(changes)}. {fix}"
            )
        if record["earlier"] != dict(earlier):
            known = record["earlier"]
            other = [name for name in earlier if known.get(name) != earlier[name]] or [*known]
            raise ValueError(
                f"The stage {stage!r} in {self.path.parent} learnt from another network than the one that the stage "
                f"{other[0]!r} has now. {fix}"
            )

    def begin(self, stage: str, configuration: Mapping[str, Any], earlier: Mapping[str, str]) -> None:
        """Write down that ``stage`` is being trained."""
        self._set(stage, {"finished": False, "configuration": plain(configuration), "earlier": dict(earlier)})

    def finish(self, stage: str, **facts: Any) -> None:
        """Write down that ``stage`` is done, and what came of it."""
        record = self.record(stage)
        assert record is not None
        self._set(stage, {**record, **facts, "finished": True})

    def forget(self, stages: list[str]) -> None:
        """Take these stages out."""
        for stage in stages:
            self.content["stages"].pop(stage, None)
        write_json(self.path, self.content)

    def _set(self, stage: str, record: Mapping[str, Any]) -> None:
        self.content["stages"][stage] = record
        write_json(self.path, self.content)


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
