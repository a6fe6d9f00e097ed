"""Read a cache, by sample id, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_distill.teachers.cache.shards import finished_shards, load_shard, to_ids
from lightning_distill.teachers.cache.spec import CacheSpec, from_planes, read_spec, require_same, row_layout
from lightning_distill.top_k import TopK, decode_top_k


class CacheReader:
    """Read a cache, by sample id, in any order; all finished shards that there are when it is made.

    It may be handed to data loader workers, forked or spawned: it travels as a folder name and opens its files anew.

    Args:
        folder: What a :class:`ShardWriter` wrote.
        verify: Whether to compare all files with their checksums now, which reads all of them; sizes are compared in
            any case. One process per machine is enough.
        teacher: Fingerprint that the cache's teacher must have; ``None`` for any.
        data: Identity that the data set must have; ``None`` for any.
        transform_seed: Seed of the transforms that the student will see; ``None`` for any.
        width: Number of classes (or size of the hidden state) that the student needs; ``None`` for any.
        k: Number of kept classes that is needed; ``None`` for any.

    Attributes:
        folder: Where the cache is.
        spec: What is in it.

    Raises:
        FileNotFoundError: If there is no cache in ``folder``.
        ValueError: If the cache is of something else than asked for, damaged, of another format version or empty, or
            if two shards disagree about a sample.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        verify: bool = True,
        teacher: str | None = None,
        data: str | None = None,
        transform_seed: int | None = None,
        width: int | None = None,
        k: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.spec = read_spec(folder)
        asked = {"teacher": teacher, "data": data, "transform_seed": transform_seed, "width": width, "k": k}
        require_same(self.folder, self.spec, {name: value for name, value in asked.items() if value is not None})
        self._opened: _Opened | None = None
        self._open(verify)

    def __len__(self) -> int:
        return len(self._open().ids)

    @property
    def sample_ids(self) -> Tensor:
        """Ids of all samples, sorted int64."""
        return self._open().ids

    def lengths(self, sample_ids: Tensor | Sequence[int]) -> Tensor:
        """Number of rows of each sample, int64, shape ``(B,)``.

        Raises:
            ValueError: If the cache lacks one of the samples.
        """
        return self._open().lengths[self._find(sample_ids)]

    def signatures(self, sample_ids: Tensor | Sequence[int]) -> Tensor:
        """What the input of each sample looked like, see :func:`input_signature`, shape ``(B, 4)``; NaN if unknown.

        Raises:
            ValueError: If the cache lacks one of the samples.
        """
        return self._open().signatures[self._find(sample_ids)]

    def holds(self, sample_ids: Tensor | Sequence[int]) -> bool:
        """Whether all of these samples are in the cache."""
        return bool(torch.isin(to_ids(sample_ids), self._open().ids).all())

    def read(self, sample_ids: Tensor | Sequence[int], *, mask: Tensor | None = None) -> TopK | Tensor:
        """What the teacher said about these samples, on the CPU, in the dtype that it is stored in.

        Args:
            sample_ids: Integers, shape ``(B,)``.
            mask: For sequences: where the rows belong, boolean, shape ``(B, T)``.

        Returns:
            A :class:`TopK`, or the logits or hidden states, of shape ``(B, ...)``. For sequences ``(B, T, ...)``, zero
            outside the mask; without a mask packed, ``(sum of lengths, ...)``, see :meth:`lengths`.

        Raises:
            ValueError: If the cache lacks a sample, or a sample has another number of rows than its mask.
        """
        opened, slots = self._open(), self._find(sample_ids)
        shards, starts, lengths = opened.shard[slots], opened.start[slots], opened.lengths[slots]
        if mask is not None:
            mask = mask.cpu()
            begins = self._begins(opened.ids[slots], lengths, mask)
        planes = {}
        for name, (dtype, _) in row_layout(self.spec).items():
            files = [shard[name] for shard in opened.shards]
            if not self.spec.sequences:
                rows = _pick(files, shards, starts)
            else:
                pieces = [
                    files[shard][start : start + length]
                    for shard, start, length in zip(shards.tolist(), starts.tolist(), lengths.tolist(), strict=True)
                ]
                rows = torch.cat([files[0][:0], *pieces]) if mask is None else _pad(pieces, mask, begins)
            planes[name] = rows.view(dtype)
        return from_planes(planes, self.spec)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "spec": self.spec, "_opened": None}

    def _open(self, verify: bool = False) -> _Opened:
        if self._opened is None:
            self._opened = _open_cache(self.folder, self.spec, verify)
        return self._opened

    def _find(self, sample_ids: Tensor | Sequence[int]) -> Tensor:
        ids = self._open().ids
        wanted = to_ids(sample_ids)
        slots = torch.searchsorted(ids, wanted).clamp_max(len(ids) - 1)
        missing = wanted[ids[slots] != wanted].tolist()
        if missing:
            more = f" and {len(missing) - 1} more of the {len(wanted)} asked for" if len(missing) > 1 else ""
            raise ValueError(
                f"The teacher cache {self.folder} has no sample {missing[0]}{more}; it holds {len(ids)} samples with "
                f"ids from {ids[0]} to {ids[-1]}. Write the cache for this data set; a new run writes only "
                "what is missing."
            )
        return slots

    def _begins(self, ids: Tensor, lengths: Tensor, mask: Tensor) -> list[int | None]:
        """First place that each sample's mask marks; ``None`` where the mask has gaps or marks nothing."""
        if not self.spec.sequences or mask.dtype != torch.bool or mask.ndim != 2 or len(mask) != len(ids):
            raise ValueError(
                f"`mask` must be boolean, of shape ({len(ids)}, T), and given for sequences only, got {mask.dtype} "
                f"of shape {tuple(mask.shape)}; `sequences` is {self.spec.sequences}."
            )
        marked = mask.sum(dim=1)
        if not torch.equal(marked, lengths):
            row = int((marked != lengths).nonzero()[0])
            raise ValueError(
                f"Sample {ids[row]} has {lengths[row]} rows in the teacher cache, but `mask` marks {marked[row]}. Use "
                "the tokenizer, truncation and mask that the cache was written with."
            )
        first = mask.byte().argmax(dim=1)
        last = mask.shape[1] - 1 - mask.byte().flip(1).argmax(dim=1)
        gapless = (last - first + 1 == lengths).tolist()
        return [begin if whole else None for begin, whole in zip(first.tolist(), gapless, strict=True)]


class _Opened(NamedTuple):
    shards: list[dict[str, Tensor]]  # planes of each shard, mapped
    ids: Tensor  # sorted; the others are parallel to it
    shard: Tensor
    start: Tensor
    lengths: Tensor
    signatures: Tensor


def _open_cache(folder: Path, spec: CacheSpec, verify: bool) -> _Opened:
    shards = [load_shard(path, spec, verify=verify) for path in finished_shards(folder)]
    if not any(len(shard["samples"]) for shard in shards):
        raise ValueError(f"The teacher cache {folder} holds no finished shard yet. Run the job that writes it.")
    ids, lengths, signatures = (
        torch.cat([shard[name] for shard in shards]) for name in ("samples", "lengths", "signatures")
    )
    starts = torch.cat([shard["lengths"].cumsum(0) - shard["lengths"] for shard in shards])
    numbers = torch.repeat_interleave(torch.tensor([len(shard["samples"]) for shard in shards]))
    ids, order = ids.sort(stable=True)
    opened = _Opened(shards, ids, numbers[order], starts[order], lengths[order], signatures[order])
    # Samplers repeat samples to give every rank equally many. The first shard's copy is kept, whoever came first.
    repeated = torch.cat([torch.zeros(1, dtype=torch.bool), ids[1:] == ids[:-1]])
    for slot in repeated.nonzero().flatten().tolist():
        if not _agree(_sample(opened, spec, slot - 1), _sample(opened, spec, slot)):
            raise ValueError(
                f"The teacher cache {folder} holds two different answers for sample {ids[slot]}. Sample ids must name "
                "one input each: number concatenated data sets apart, and seed random transforms per sample."
            )
    return _Opened(shards, *(part[~repeated] for part in opened[1:]))


def _sample(opened: _Opened, spec: CacheSpec, slot: int) -> TopK | Tensor:
    planes = opened.shards[int(opened.shard[slot])]
    rows = slice(int(opened.start[slot]), int(opened.start[slot] + opened.lengths[slot]))
    return from_planes({name: planes[name][rows].view(dtype) for name, (dtype, _) in row_layout(spec).items()}, spec)


def _agree(first: TopK | Tensor, second: TopK | Tensor) -> bool:
    """Whether two answers are equal up to what another batch composition changes in half-precision kernels: 5 %."""
    if isinstance(first, TopK):
        assert isinstance(second, TopK)
        return first.ids.shape == second.ids.shape and not _total_variation(first, second) > 0.05
    assert isinstance(second, Tensor)
    if first.shape != second.shape:
        return False
    return bool((first.float() - second.float()).norm() <= 0.05 * first.float().norm())


def _total_variation(first: TopK, second: TopK) -> float:
    """Mean total variation distance between rows, classes kept by one of the two alone counted as differing."""
    a, b = (decode_top_k(top_k, temperature=top_k.temperatures[0]) for top_k in (first, second))
    same = a.ids.unsqueeze(-1) == b.ids.unsqueeze(-2)
    matched = (same * b.log_probs.exp().unsqueeze(-2)).sum(dim=-1)
    overlap = a.log_probs.exp().minimum(matched).sum(dim=-1) + a.tail_log_prob.minimum(b.tail_log_prob).exp()
    return 1.0 - overlap.mean().item()


def _pick(files: list[Tensor], shards: Tensor, rows: Tensor) -> Tensor:
    picked = files[0].new_empty(len(rows), *files[0].shape[1:])
    for shard in set(shards.tolist()):
        here = (shards == shard).nonzero().flatten()
        picked[here] = files[shard][rows[here]]
    return picked


def _pad(pieces: list[Tensor], mask: Tensor, begins: list[int | None]) -> Tensor:
    """Rows of each sample where its mask is, zeros elsewhere; ``begins`` says where masks that are intervals begin."""
    padding = pieces[0].new_zeros(mask.shape[1], *pieces[0].shape[1:])
    parts = [padding[:0]]
    for i, (piece, begin) in enumerate(zip(pieces, begins, strict=True)):
        if begin is None:
            scattered = padding.clone()
            scattered[mask[i]] = piece
            parts.append(scattered)
        else:  # slices alone, which torch.cat copies several times faster than a scatter
            end = begin + len(piece)
            parts += [padding[:begin], piece] if begin else [piece]
            parts += [padding[end:]] if end < len(padding) else []
    return torch.cat(parts).reshape(*mask.shape, *padding.shape[1:])
