"""What a cache holds, and of what.

A cache is a folder::

    manifest.json               what is stored (a `CacheSpec`) and the version of the format
    head.safetensors            kind "hidden": the output layer that turns hidden states into logits
    shard-00000-00000/          the first shard of the writer with rank 0
        samples.bin             id of each sample, int64
        lengths.bin             rows of each sample (its tokens; always 1 without sequences), int64
        signatures.bin          what each sample's input looked like, see `input_signature`; NaN if that is not known
        ids.bin deltas.bin tail.bin     kind "top_k": one file per quantity, its rows one after the other
        values.bin                      kinds "dense" and "hidden"
        footer.json             shapes and checksums; written last, so a shard without it is unfinished and not read

Files of one quantity each, read through memory maps, are several times faster than records, safetensors or Arrow.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.top_k import TopK, check_top_k, encode_top_k, id_dtype

FORMAT_VERSION = 1
SIGNATURE = 4
"""Numbers that describe the input of a sample, see :func:`input_signature`."""

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class CacheSpec:
    """What a cache holds, and of what.

    Args:
        kind: ``"top_k"`` for the largest logits and the tail's mass, ``"dense"`` for all logits, or ``"hidden"`` for
            the last hidden state, from which the teacher's head gives exact logits.
        width: Classes, or vocabulary size of the logits; size of the hidden state for ``"hidden"``.
        sequences: Whether a sample is a sequence of rows (tokens) instead of a single row.
        k: Classes kept by ``"top_k"``, in [1, width]; the other kinds set it to 0.
        temperatures: At which ``"top_k"`` keeps the tail's mass, 4 bytes per row each; the other kinds empty it.
        dtype: Of the values of ``"dense"`` and ``"hidden"``: float32, float16 or bfloat16. Choose what the teacher
            computes in. ``"top_k"`` sets it to float16.
        teacher: Identity of the teacher, for example its :func:`fingerprint`.
        data: Identity of the data set that the sample ids belong to.
        transform_seed: Seed of the random transforms that the teacher saw; 0 if there were none.

    Raises:
        ValueError: If a field is out of its range.
    """

    kind: Literal["top_k", "dense", "hidden"]
    width: int
    sequences: bool = False
    k: int = 64
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    dtype: str = "float32"
    teacher: str = ""
    data: str = ""
    transform_seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("top_k", "dense", "hidden"):
            raise ValueError(f"`kind` must be 'top_k', 'dense' or 'hidden', got {self.kind!r}.")
        if not self.width >= 1:
            raise ValueError(f"`width` must be at least 1, got {self.width}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        # A field without a meaning for the kind gets a fixed value, so that it cannot tell equal caches apart.
        values: dict[str, Any] = {"k": 0, "temperatures": ()}
        if self.kind == "top_k":
            values = {"temperatures": check_top_k(self.k, self.temperatures, self.width), "dtype": "float16"}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def address(self) -> str:
        """32 hexadecimal digits that name these contents; a folder called so is never used for others."""
        return hashlib.blake2b(json.dumps(manifest_of(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The planes that a cache stores for ``values``, shape ``(rows..., width)``, on their device.

        Raises:
            ValueError: If the last dimension is not ``width``, or a value is not finite (in ``dtype``).
        """
        if values.shape[-1] != self.width:
            raise ValueError(f"`values` must have a last dimension of {self.width}, got shape {tuple(values.shape)}.")
        if self.kind == "top_k":
            return top_k_planes(encode_top_k(values, k=self.k, temperatures=self.temperatures))
        stored = values.detach().to(DTYPES[self.dtype])
        if not torch.isfinite(stored).all():
            raise ValueError(
                f"`values` must be finite in {self.dtype}, but the teacher returned NaN, infinity or a value beyond "
                f"{torch.finfo(stored.dtype).max:g}. Use `dtype='float32'`, or run the teacher in a wider precision."
            )
        return {"values": stored}


def read_spec(folder: str | Path) -> CacheSpec:
    """What the cache in ``folder`` holds.

    Raises:
        FileNotFoundError: If there is no cache.
        ValueError: If its manifest is damaged or of another format version.
    """
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"There is no teacher cache in {str(folder)!r}. Write it first, or fix the path.")
    try:
        manifest = json.loads(path.read_text())
        version = manifest.pop("version")
        if version == FORMAT_VERSION:
            return CacheSpec(**{**manifest, "temperatures": tuple(manifest["temperatures"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The manifest {path} of the teacher cache is damaged ({error}). Write the cache again."
        ) from error
    raise ValueError(
        f"The teacher cache {folder} has format version {version}, but this version of lightning-distill reads version "
        f"{FORMAT_VERSION}. Write the cache again."
    )


def manifest_of(spec: CacheSpec) -> dict[str, Any]:
    """Content of the file that describes a cache."""
    return {"version": FORMAT_VERSION, **asdict(spec)}


def require_same(folder: Path, stored: CacheSpec, asked: dict[str, Any]) -> None:
    """Refuse a cache that is of something else.

    Raises:
        ValueError: If a field of ``stored`` is not what is ``asked`` for.
    """
    found = asdict(stored)
    differences = [
        f"`{name}` is {found[name]!r}, not {value!r}" for name, value in asked.items() if found[name] != value
    ]
    if differences:
        raise ValueError(
            f"The teacher cache {folder} holds something else than was asked for: {'; '.join(differences)}. "
            "Use what it was written with, or write a new cache in another folder."
        )


SAMPLE_LAYOUT: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "samples": (torch.int64, ()),
    "lengths": (torch.int64, ()),
    "signatures": (torch.float32, (SIGNATURE,)),
}
"""Planes with one entry per sample; the others have one per row."""


def layout(spec: CacheSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and row shape of each plane."""
    return {**SAMPLE_LAYOUT, **row_layout(spec)}


def row_layout(spec: CacheSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and row shape of the planes with one entry per row."""
    if spec.kind == "top_k":
        return {
            "ids": (id_dtype(spec.width), (spec.k,)),
            "deltas": (torch.float16, (spec.k,)),
            "tail": (torch.float32, (len(spec.temperatures),)),
        }
    return {"values": (DTYPES[spec.dtype], (spec.width,))}


def top_k_planes(top_k: TopK) -> dict[str, Tensor]:
    """Its tensors by plane."""
    return {"ids": top_k.ids, "deltas": top_k.deltas, "tail": top_k.tail_logsumexp}


def from_planes(planes: dict[str, Tensor], spec: CacheSpec) -> TopK | Tensor:
    """What the planes hold, the inverse of :meth:`CacheSpec.encode`."""
    if spec.kind == "top_k":
        return TopK(planes["ids"], planes["deltas"], planes["tail"], spec.temperatures, spec.width)
    return planes["values"]
