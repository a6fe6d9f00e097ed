"""Append what a teacher says to a cache."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from lightning_distill.teachers.cache.shards import OpenShard, finished_ids, select_rows, to_ids, write_json
from lightning_distill.teachers.cache.spec import (
    SIGNATURE,
    CacheSpec,
    manifest_of,
    read_spec,
    require_same,
    top_k_planes,
)
from lightning_distill.top_k import TopK, listed


class ShardWriter:
    """Append what a teacher says to a cache.

    Several processes write to one folder without knowing of each other, each with its own ``rank``; only one writer
    per rank may be at work. A shard counts from the moment when it is full or :meth:`close` was called: after a crash,
    a new writer removes what its rank left unfinished, and :meth:`write` passes over samples that finished shards
    hold, so that running the same job again, with any number of ranks, writes what is missing.

    Args:
        folder: Made if it does not exist.
        spec: What is written.
        rank: Number of this process.
        shard_items: Rows after which a shard is closed and the next begun; at most so much is lost in a crash.

    Raises:
        ValueError: If the folder holds a cache of another ``spec``, or an argument is out of range.

    Example:
        >>> import tempfile
        >>> from lightning_distill.teachers.cache.reader import CacheReader
        >>> folder = tempfile.mkdtemp()
        >>> with ShardWriter(folder, CacheSpec("dense", width=3)) as writer:
        ...     writer.write(torch.tensor([7, 4]), torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
        >>> CacheReader(folder).read([4])
        tensor([[3., 4., 5.]])
    """

    def __init__(self, folder: str | Path, spec: CacheSpec, *, rank: int = 0, shard_items: int = 2**20) -> None:
        if not 0 <= rank <= 99999:
            raise ValueError(f"`rank` must be in [0, 99999], got {rank}.")
        if not shard_items >= 1:
            raise ValueError(f"`shard_items` must be at least 1, got {shard_items}.")
        self.folder = Path(folder)
        self.spec = spec
        self.rank = rank
        self.shard_items = shard_items
        self._shard: OpenShard | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "manifest.json").exists():
            write_json(self.folder / "manifest.json", manifest_of(spec))
        require_same(self.folder, read_spec(self.folder), asdict(spec))
        for path in self.folder.glob(f"shard-{rank:05d}-*"):
            if not (path / "footer.json").exists():
                shutil.rmtree(path)
        self._skip = self.finished_ids()

    def finished_ids(self) -> Tensor:
        """Ids of the samples in finished shards, of all ranks; sorted int64."""
        return finished_ids(self.folder, self.spec)

    def write(
        self,
        sample_ids: Tensor,
        values: Tensor | TopK,
        *,
        mask: Tensor | None = None,
        signatures: Tensor | None = None,
    ) -> None:
        """Append a batch; samples that were in finished shards when the writer was made are passed over.

        Args:
            sample_ids: Identity of each sample in the data set, integers of shape ``(B,)``.
            values: Logits or hidden states, shape ``(B, width)``, or ``(B, T, width)`` with ``sequences``; or, for the
                kind "top_k", their :class:`TopK`. On any device: what is stored is computed there.
            mask: Which of the ``T`` rows exist (are no padding), boolean, shape ``(B, T)``; ``None`` for all.
            signatures: Of the samples' inputs, see :func:`input_signature`, shape ``(B, 4)``; ``None`` if not known.

        Raises:
            ValueError: If shapes do not fit the spec or each other, or the teacher's values are not finite.
            TypeError: If the ids are not integers.
        """
        samples = to_ids(sample_ids)
        tensors = _planes(values)
        shape = next(iter(tensors.values())).shape[:-1]
        if len(shape) != 1 + self.spec.sequences or shape[0] != len(samples):
            expected = (len(samples), *(["T"] if self.spec.sequences else []), self.spec.width)
            raise ValueError(
                f"`values` for {len(samples)} sample ids must have shape ({', '.join(map(str, expected))}), or be the "
                f"`TopK` of that, got items of shape {tuple(shape)}; `sequences` is {self.spec.sequences}."
            )
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool or not self.spec.sequences):
            raise ValueError(
                "`mask` must be boolean, of shape (B, T), and given for sequences only, got "
                f"{mask.dtype} of shape {tuple(mask.shape)} for items of shape {tuple(shape)}."
            )
        if mask is None or mask.all():  # a mask that keeps everything would copy all logits for nothing
            lengths = torch.full((len(samples),), math.prod(shape[1:]))
            packed = {name: tensor.flatten(0, len(shape) - 1) for name, tensor in tensors.items()}
        else:
            lengths = mask.sum(dim=1)
            packed = {name: select_rows(tensor, mask.to(tensor.device)) for name, tensor in tensors.items()}
        rows = packed["values"] if isinstance(values, Tensor) else _top_k(packed, values)
        self.write_packed(samples, rows, lengths, signatures=signatures)

    def write_packed(
        self, sample_ids: Tensor, rows: Tensor | TopK, lengths: Tensor, *, signatures: Tensor | None = None
    ) -> None:
        """Append a batch whose rows stand one after the other, without padding; otherwise as :meth:`write`.

        Args:
            sample_ids: Integers of shape ``(B,)``.
            rows: Logits or hidden states, shape ``(sum of lengths, width)``, or their :class:`TopK`.
            lengths: Number of rows of each sample, integers of shape ``(B,)``.
            signatures: Shape ``(B, 4)``.

        Raises:
            ValueError: If shapes do not fit the spec or each other, or the teacher's values are not finite.
            TypeError: If the ids are not integers.
        """
        samples, lengths = to_ids(sample_ids), lengths.to("cpu", torch.int64)
        tensors = _planes(rows)
        found = next(iter(tensors.values())).shape[:-1]
        if lengths.shape != samples.shape or found != (int(lengths.sum()),):
            raise ValueError(
                f"`rows` must have shape (n, {self.spec.width}), or be the `TopK` of that, where `lengths`, one per "
                f"sample, add up to n; got items of shape {tuple(found)}, {len(samples)} samples and lengths of shape "
                f"{tuple(lengths.shape)} with the sum {int(lengths.sum())}."
            )
        if isinstance(rows, TopK):
            self._check_top_k(rows)
        if signatures is None:
            signatures = torch.full((len(samples), SIGNATURE), math.nan)
        new = ~torch.isin(samples, self._skip)
        if not new.any():
            return
        if not new.all():
            keep = new.repeat_interleave(lengths)
            tensors = {name: select_rows(tensor, keep.to(tensor.device)) for name, tensor in tensors.items()}
        planes = tensors if isinstance(rows, TopK) else self.spec.encode(tensors["values"])
        self._append({"samples": samples[new], "lengths": lengths[new], "signatures": signatures.cpu()[new], **planes})

    def close(self) -> None:
        """Finish the current shard, so that its samples count."""
        if self._shard is not None:
            shard, self._shard = self._shard, None
            shard.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()  # also after an error: what was written until then is whole

    def _append(self, planes: dict[str, Tensor]) -> None:
        if self._shard is None:
            numbers = [int(path.name.rsplit("-", 1)[1]) for path in self.folder.glob(f"shard-{self.rank:05d}-*")]
            name = f"shard-{self.rank:05d}-{max(numbers, default=-1) + 1:05d}"
            self._shard = OpenShard(self.folder / name, self.spec)
        try:
            self._shard.append(planes)
        except BaseException:  # a full disk, an interrupt: the planes may differ in length, so never publish them
            shard, self._shard = self._shard, None
            shard.abandon()
            raise
        if self._shard.rows >= self.shard_items:
            self.close()

    def _check_top_k(self, top_k: TopK) -> None:
        spec = self.spec
        if spec.kind != "top_k" or top_k.ids.shape[-1] != spec.k or tuple(top_k.temperatures) != spec.temperatures:
            raise ValueError(
                f"`values` is the top {top_k.ids.shape[-1]} at temperatures {listed(top_k.temperatures)}, but the "
                f"cache is of kind {spec.kind!r} with k={spec.k} at temperatures {listed(spec.temperatures)}."
            )


def _planes(values: Tensor | TopK) -> dict[str, Tensor]:
    return top_k_planes(values) if isinstance(values, TopK) else {"values": values}


def _top_k(planes: dict[str, Tensor], like: TopK) -> TopK:
    return TopK(planes["ids"], planes["deltas"], planes["tail"], like.temperatures, like.classes)
