"""Where a comparison keeps what, and the check that a folder belongs to the comparison that is asked for."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_distill.files import changes_between, read_json, write_json
from lightning_distill.locks import LOCK, OWNER

CONFIGURATION = "configuration.json"
RESULTS = "results.json"
TABLE = "results.csv"
PLOTS = ("results.png", "gain.png", "curves.png")
RESERVED = ("wandb",)


def slug(name: str) -> str:
    """``name`` as a folder name.

    Raises:
        ValueError: If nothing is left of it, or the name is taken by the comparison itself.

    Example:
        >>> slug("Student alone (α = 1)")
        'student-alone-1'
    """
    text = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
    if not text or text in RESERVED:
        raise ValueError(
            f"{name!r} cannot name a method: its folder would be called {text!r}. Use letters or digits, and none of "
            f"{', '.join(RESERVED)}."
        )
    return text


def run_folder(folder: str | Path, name: str, seed: int | None) -> Path:
    """Folder of the run of method ``name`` with ``seed``; ``seed=None`` for a reference, which has one run."""
    path = Path(folder) / slug(name)
    return path if seed is None else path / f"seed{seed}"


def student_path(folder: str | Path, name: str, seed: int | None = None) -> Path:
    """Where a comparison in ``folder`` puts the exported student of a run.

    Args:
        folder: Folder of the comparison.
        name: Name of a reference or of a method.
        seed: Seed of the method's run; ``None`` for a reference.

    Example:
        >>> student_path("runs/mnist1d", "Big teacher").as_posix()
        'runs/mnist1d/big-teacher/student.safetensors'
    """
    return run_folder(folder, name, seed) / "student.safetensors"


def open_folder(
    folder: Path, names: Iterable[str], configuration: Mapping[str, Any] | None = None, *, fresh: bool = False
) -> str:
    """Make ``folder``, or check that what it holds was made with the same ``configuration``.

    New entries of the configuration's ``"methods"`` are no change: methods may be added to a finished comparison.

    Args:
        folder: Folder of the comparison.
        names: Methods and references, whose folders :func:`clear` may delete.
        configuration: Anything that JSON can hold.
        fresh: Delete an earlier comparison in ``folder`` first.

    Returns:
        Identifier of the comparison, the same when it is resumed.

    Raises:
        TypeError: If JSON cannot hold ``configuration``.
        ValueError: If it differs from the one of the runs in ``folder``, or if ``fresh`` would delete a folder that
            is none of a comparison.
    """
    try:
        described = json.loads(json.dumps(dict(configuration or {})))
    except TypeError as error:
        raise TypeError(f"`configuration` must consist of what JSON can hold: {error}.") from error
    path = folder / CONFIGURATION
    folders = {slug(name) for name in names}
    if fresh:
        clear(folder)
    if path.exists():
        stored = read_json(path)
        changes = list(changes_between(stored["configuration"], described, open_ended=("methods",)))
        if changes:
            raise ValueError(
                f"The runs in {folder} were trained with another configuration: {'; '.join(changes)}. Delete them and "
                "start over with `fresh=True` (`--fresh`), or choose another `folder`."
            )
        if isinstance(stored["configuration"].get("methods"), dict) and isinstance(described.get("methods"), dict):
            # The finished runs of a method that is left out this time stay.
            described["methods"] = {**stored["configuration"]["methods"], **described["methods"]}
        folders |= set(stored["folders"])
        identifier = str(stored["id"])
        created = stored["created"]
    else:
        identifier = uuid.uuid4().hex[:8]
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    description = {"id": identifier, "created": created, "folders": sorted(folders), "configuration": described}
    write_json(path, description)
    return identifier


def clear(folder: Path) -> None:
    """Delete what a comparison made in ``folder``, and nothing else.

    Raises:
        ValueError: If the folder has files but no comparison.
    """
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {LOCK, OWNER}:
        return
    if not (folder / CONFIGURATION).exists():
        raise ValueError(
            f"{folder} is not empty and not the folder of a comparison (it has no {CONFIGURATION}), so `fresh=True` "
            "does not delete it. Choose another `folder`."
        )
    for name in (*read_json(folder / CONFIGURATION)["folders"], *RESERVED):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (RESULTS, TABLE, *PLOTS):
        (folder / name).unlink(missing_ok=True)
    (folder / CONFIGURATION).unlink()  # last, so that an interrupted deletion can be repeated
