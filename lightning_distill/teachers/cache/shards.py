"""Shards: folders with one file per quantity, whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_distill.teachers.cache.spec import SAMPLE_LAYOUT, CacheSpec, layout

_SHARD = re.compile(r"shard-\d{5}-\d{5,}")
# torch can do little with unsigned 16-bit integers, so they are moved about as the signed ones of the same bits.
CARRIER = {torch.uint16: torch.int16}


class OpenShard:
    """A shard that is being written: files that grow, and their checksums."""

    def __init__(self, path: Path, spec: CacheSpec) -> None:
        path.mkdir()
        self.path = path
        self.spec = spec
        self.samples = 0
        self.rows = 0
        self._files: dict[str, BinaryIO] = {name: open(path / f"{name}.bin", "wb") for name in layout(spec)}  # noqa: SIM115
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in self._files}

    def append(self, planes: dict[str, Tensor]) -> None:
        """Write rows at the end of each file."""
        self.samples += len(planes["samples"])
        self.rows += int(planes["lengths"].sum())
        for name, (dtype, _) in layout(self.spec).items():
            raw = bytes_of(planes[name].to(dtype))
            self._files[name].write(raw)
            self._digests[name].update(raw)

    def abandon(self) -> None:
        """Leave the shard unfinished, so that nobody reads it."""
        for file in self._files.values():
            file.close()

    def publish(self) -> None:
        """Make the shard count."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        checksums = {name: digest.hexdigest() for name, digest in self._digests.items()}
        footer = {"cache": self.spec.address, "samples": self.samples, "rows": self.rows, "blake2b": checksums}
        write_json(self.path / "footer.json", footer)


def finished_shards(folder: Path) -> list[Path]:
    """Folders of the shards that count, in the order of their names."""
    return sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name) and (path / "footer.json").exists())


def load_shard(path: Path, spec: CacheSpec, *, verify: bool = False) -> dict[str, Tensor]:
    """Map the planes of a shard, after a look at their sizes and, if wanted, checksums."""
    try:
        footer = json.loads((path / "footer.json").read_text())
        owner, counts, checksums = footer["cache"], (footer["samples"], footer["rows"]), footer["blake2b"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path / "footer.json", f"cannot be read ({error})") from error
    if owner != spec.address:
        raise damaged(path / "footer.json", "belongs to another cache or is changed")
    planes = {}
    for name, (dtype, shape) in layout(spec).items():
        file = path / f"{name}.bin"
        count = counts[0] if name in SAMPLE_LAYOUT else counts[1]
        size = file.stat().st_size if file.exists() else 0
        expected = count * math.prod(shape) * dtype.itemsize
        if size != expected:
            raise damaged(file, f"has {size} bytes instead of {expected}")
        if verify and _checksum(file) != checksums.get(name):
            raise damaged(file, "differs from its checksum")
        planes[name] = _map(file, CARRIER.get(dtype, dtype), (count, *shape))
    if int(planes["lengths"].sum()) != counts[1]:
        raise damaged(path / "lengths.bin", "does not add up to the rows of the shard")
    return planes


def finished_ids(folder: Path, spec: CacheSpec) -> Tensor:
    """Ids of the samples in finished shards, of all ranks; sorted int64."""
    shards = [load_shard(path, spec) for path in finished_shards(folder)]
    samples = torch.cat([torch.empty(0, dtype=torch.int64), *(shard["samples"] for shard in shards)])
    ids: Tensor = samples.unique()
    return ids


def damaged(file: Path, what: str) -> ValueError:
    """What is raised when a shard cannot be trusted."""
    return ValueError(
        f"The teacher cache is damaged: {file} {what}. Delete the folder {file.parent} and run the job that wrote the "
        "cache again; it writes only what is missing."
    )


def _checksum(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _map(file: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not math.prod(shape):
        return torch.empty(shape, dtype=dtype)
    # Unlike numpy's memmap this keeps no file descriptor, of which a large cache would need thousands.
    return torch.from_file(str(file), shared=False, size=math.prod(shape), dtype=dtype).reshape(shape)


def select_rows(tensor: Tensor, keep: Tensor) -> Tensor:
    """``tensor[keep]``, of any dtype."""
    return tensor.view(CARRIER.get(tensor.dtype, tensor.dtype))[keep].view(tensor.dtype)


def to_ids(sample_ids: Tensor | Sequence[int]) -> Tensor:
    """Sample ids as int64 on the CPU, shape ``(B,)``.

    Raises:
        TypeError: If they are not integers.
    """
    ids = torch.as_tensor(sample_ids)
    if ids.dtype == torch.bool or (ids.is_floating_point() and ids.numel() > 0):
        raise TypeError(f"`sample_ids` must be integers, got {ids.dtype}.")
    return ids.to("cpu", torch.int64).reshape(-1)


def bytes_of(tensor: Tensor) -> memoryview:
    """The contents of ``tensor``, row-major."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write so that readers see all of the file or none of it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
