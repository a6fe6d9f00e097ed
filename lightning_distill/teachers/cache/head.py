"""The output layer beside cached hidden states."""

from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

from torch import Tensor, nn

from lightning_distill.teachers.cache.shards import bytes_of

FILE = "head.safetensors"


def write_head(folder: Path, head: nn.Linear) -> None:
    """Store ``head`` in the cache, unless it is there; the whole file or nothing."""
    from safetensors.torch import save_file

    path = folder / FILE
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in head.named_parameters()}
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    save_file(tensors, temporary, metadata={"blake2b": _checksum(tensors)})
    os.replace(temporary, path)


def read_head(folder: Path, width: int) -> nn.Linear:
    """The output layer of a cache of hidden states.

    Raises:
        ValueError: If it is missing, damaged, or does not take hidden states of ``width``.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    fix = "Delete the folder and write the cache again."
    if not path.is_file():
        raise ValueError(f"The teacher cache is damaged: {path} is missing. {fix}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            expected = (file.metadata() or {}).get("blake2b")
    except SafetensorError as error:
        raise ValueError(f"The teacher cache is damaged: {path} cannot be read ({error}). {fix}") from error
    if _checksum(tensors) != expected or tensors["weight"].shape[1] != width:
        raise ValueError(f"The teacher cache is damaged: {path} differs from its checksum. {fix}")
    weight = tensors["weight"]
    head: nn.Linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], len(weight), bias="bias" in tensors, dtype=weight.dtype
    )
    head.load_state_dict(tensors)
    return head


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()
