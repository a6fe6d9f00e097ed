"""Networks with settings beside their weights, in a folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def write_folder(
    folder: str | Path, name: str, settings: Any, weights: Mapping[str, Tensor], *, overwrite: bool = False
) -> None:
    """Write ``settings`` as JSON under ``name``, and weights as ``model.safetensors``, whole or not at all.

    Raises:
        FileExistsError: If there is something at ``folder`` and ``overwrite`` is False.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{str(folder)!r} exists. Choose another path, or pass `overwrite=True`.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as draft:
        inner = Path(draft) / folder.name
        inner.mkdir()
        copies = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in weights.items()}
        save_file(copies, str(inner / "model.safetensors"))
        (inner / name).write_text(json.dumps(settings, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(inner, folder)
