"""What takes long to make, kept on disk between runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


def cached(name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``make`` returns, from the file ``name`` in the cache folder if it is there.

    Files are written whole or not at all. One that cannot be read is made anew, and a folder that cannot be written to
    costs only time.

    Args:
        name: Of the file. It must tell everything that ``make`` depends on.
        make: Returns tensors, numbers, texts, and lists or dictionaries of them.
    """
    path = cache_folder() / name
    try:
        saved: dict[str, Any] = torch.load(path, weights_only=True)
    except Exception:  # missing, damaged, or of another version
        saved = make()
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                torch.save(saved, file)
            os.replace(file.name, path)
    return saved


def cache_folder() -> Path:
    """Where generated data are kept between runs: ``LIGHTNING_DISTILL_CACHE``, or ``~/.cache/lightning_distill``."""
    named = os.environ.get("LIGHTNING_DISTILL_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "lightning_distill"
