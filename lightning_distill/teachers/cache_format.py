"""What a teacher said, on disk: written once, read in any order by any number of processes.

A cache is a folder::

    manifest.json               what is stored (a `CacheSpec`) and the version of the format
    shard-00000-00000/          the first shard of the writer with rank 0
        samples.bin             id of each sample, int64
        lengths.bin             rows of each sample (its tokens; always 1 without sequences), int64
        ids.bin deltas.bin tail.bin     kind "top_k": one file per quantity, its rows one after the other
        values.bin                      kinds "dense" and "hidden"
        footer.json             shapes and checksums; written last, so a shard without it is unfinished and not read

Files of one quantity each, read through memory maps, are several times faster than records, safetensors or Arrow.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

FORMAT_VERSION = 1
FLOOR = math.log(torch.finfo(torch.float32).tiny)
"""Least log-probability of a tail: it keeps `p * log(p)` finite where the stored classes have all the mass."""

_CHUNK = {"cpu": 2**22}  # logits that the encoder widens at a time: what fits the caches of a processor
_CHUNK_ELSEWHERE = 2**25
_SHARD = re.compile(r"shard-\d{5}-\d{5,}")
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# torch can do little with unsigned 16-bit integers, so they are moved about as the signed ones of the same bits.
_CARRIER = {torch.uint16: torch.int16}


class TopK(NamedTuple):
    """The `k` largest logits of each row and, per temperature, the mass of all others.

    Attributes:
        ids: Classes in order of falling logit, shape ``(rows..., k)``; uint16 up to 65536 classes, else int32.
        deltas: Their logits minus the row's largest, float16, same shape; the first is 0.
        tail_logsumexp: ``log(sum(exp(delta / T)))`` over the other classes, float32, shape
            ``(rows..., len(temperatures))``; minus infinity where there are none.
        temperatures: At which the tail is known.
    """

    ids: Tensor
    deltas: Tensor
    tail_logsumexp: Tensor
    temperatures: tuple[float, ...]


class TopKLogProbs(NamedTuple):
    """Log-probabilities at one temperature; kept classes and tail together have mass 1.

    Attributes:
        ids: Kept classes, int64, shape ``(rows..., k)``.
        log_probs: Of the kept classes, nats, float32, same shape.
        tail_log_prob: Of all others together, nats, at least :data:`FLOOR`, shape ``(rows...)``.
    """

    ids: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor


def encode_top_k(logits: Tensor, *, k: int = 64, temperatures: Sequence[float] = (1.0, 2.0, 4.0)) -> TopK:
    """Keep the `k` largest logits of each row, and the mass of the rest at each temperature.

    The tail's mass at a temperature cannot be computed from its mass at another one, so the temperatures of the later
    training must be known now. What is stored is the logsumexp of the tail itself: one of all classes would leave a
    small tail to the difference of two numbers close to 1, one of which went through float16.

    Args:
        logits: Unnormalised scores, shape ``(rows..., C)``; minus infinity for classes ruled out.
        k: Classes to keep, in [1, C].
        temperatures: Positive.

    Raises:
        ValueError: If ``k`` or a temperature is out of range, or a row has NaN, plus infinity or nothing finite.

    Example:
        >>> encode_top_k(torch.tensor([[0.0, 3.0, 1.0, 2.0]]), k=2, temperatures=[1.0]).deltas
        tensor([[ 0., -1.]], dtype=torch.float16)
    """
    classes = logits.shape[-1]
    stored = _check_top_k(k, temperatures, classes)
    rows = logits.detach().reshape(-1, classes)
    size = max(1, _CHUNK.get(logits.device.type, _CHUNK_ELSEWHERE) // classes)
    parts = [_encode_rows(rows[i : i + size], k, stored) for i in range(0, max(1, len(rows)), size)]
    planes = (torch.cat(plane) for plane in zip(*parts, strict=True))
    ids, deltas, tail = (plane.reshape(*logits.shape[:-1], plane.shape[-1]) for plane in planes)
    return TopK(ids.to(_id_dtype(classes)), deltas, tail, stored)


def _encode_rows(logits: Tensor, k: int, temperatures: Iterable[float]) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    top, ids = wide.topk(k, dim=-1)
    largest = top[:, :1]
    if not torch.isfinite(largest).all():  # topk puts NaN first
        raise ValueError(
            "`logits` must be finite (minus infinity excepted) with one finite value per row at least, but the "
            "teacher returned NaN, plus infinity or a row of minus infinity. Run it in a wider precision."
        )
    deltas = (top - largest).clamp_min(torch.finfo(torch.float16).min).half()
    # The tail's maximum is the same at all temperatures: half the time of torch.logsumexp at each of them.
    rest = wide.scatter(-1, ids, -math.inf).sub_(largest)
    second = rest.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).min)  # there may be no tail
    rest -= second
    tail = [(rest / t).exp_().sum(dim=-1, keepdim=True).log_() + second / t for t in temperatures]
    return ids, deltas, torch.cat(tail, dim=-1).float()


def decode_top_k(top_k: TopK, *, temperature: float = 1.0) -> TopKLogProbs:
    """Log-probabilities of the kept classes and of the tail at one of the stored temperatures.

    Args:
        top_k: What :func:`encode_top_k` made, on any device.
        temperature: One of ``top_k.temperatures``.

    Raises:
        ValueError: If the tail at ``temperature`` was not stored.

    Example:
        >>> top_k = encode_top_k(torch.tensor([0.5, 0.3, 0.2]).log(), k=1, temperatures=[1.0])
        >>> decode_top_k(top_k, temperature=1.0).tail_log_prob.exp()
        tensor(0.5000)
    """
    tail = top_k.tail_logsumexp[..., temperature_index(top_k.temperatures, temperature)]
    kept = top_k.deltas.float() / temperature
    total = torch.logaddexp(kept.logsumexp(dim=-1), tail)
    return TopKLogProbs(top_k.ids.long(), kept - total.unsqueeze(-1), (tail - total).clamp_min(FLOOR))


def temperature_index(temperatures: Sequence[float], temperature: float) -> int:
    """Position of ``temperature`` among the stored ones.

    Raises:
        ValueError: If it is none of them.
    """
    for index, stored in enumerate(temperatures):
        if math.isclose(stored, temperature, rel_tol=1e-6):
            return index
    raise ValueError(
        f"`temperature` must be one that the teacher's tail was stored at, {_listed(temperatures)}, got "
        f"{temperature}: the tail cannot be computed from another temperature's. Train at a stored temperature, or "
        f"write the cache again with {temperature} among `temperatures`."
    )


def fingerprint(module: nn.Module) -> str:
    """Hash of a network's weights, buffers, the classes of its parts, and its configuration if it has one.

    The device does not matter, nor the path that a Hugging Face network came from; the dtype of the weights does.
    Under sharding (FSDP and the like) take it before the network is wrapped.

    Args:
        module: The network; its weights must be in memory.

    Returns:
        32 hexadecimal digits.

    Raises:
        ValueError: If a weight is on the meta device.
    """
    digest = hashlib.blake2b(digest_size=16)
    parts = {name: f"{type(part).__module__}.{type(part).__qualname__}" for name, part in module.named_modules()}
    digest.update(json.dumps([parts, _configuration(module)], sort_keys=True, default=str).encode())
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):  # a module's extra state
            digest.update(f"{name} {value!r}".encode())
            continue
        if value.is_meta:
            raise ValueError(f"`module` has no weights in memory: {name!r} is on the meta device. Load them first.")
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _configuration(module: nn.Module) -> dict[str, Any]:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    if not callable(to_dict):
        return {}
    passing = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # where it was, not what it is
    return {key: value for key, value in to_dict().items() if key not in passing}


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
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, got {self.dtype!r}.")
        # A field without a meaning for the kind gets a fixed value, so that it cannot tell equal caches apart.
        values: dict[str, Any] = {"k": 0, "temperatures": ()}
        if self.kind == "top_k":
            values = {"temperatures": _check_top_k(self.k, self.temperatures, self.width), "dtype": "float16"}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def address(self) -> str:
        """32 hexadecimal digits that name these contents; a folder called so is never used for others."""
        return hashlib.blake2b(json.dumps(_manifest(self), sort_keys=True).encode(), digest_size=16).hexdigest()

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """The planes that a cache stores for ``values``, shape ``(rows..., width)``, on their device.

        Raises:
            ValueError: If the last dimension is not ``width``, or a value is not finite (in ``dtype``).
        """
        if values.shape[-1] != self.width:
            raise ValueError(f"`values` must have a last dimension of {self.width}, got shape {tuple(values.shape)}.")
        if self.kind == "top_k":
            return _top_k_planes(encode_top_k(values, k=self.k, temperatures=self.temperatures))
        stored = values.detach().to(_DTYPES[self.dtype])
        if not torch.isfinite(stored).all():
            raise ValueError(
                f"`values` must be finite in {self.dtype}, but the teacher returned NaN, infinity or a value beyond "
                f"{torch.finfo(stored.dtype).max:g}. Use `dtype='float32'`, or run the teacher in a wider precision."
            )
        return {"values": stored}


class CacheWriter:
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
        >>> folder = tempfile.mkdtemp()
        >>> with CacheWriter(folder, CacheSpec("dense", width=3)) as writer:
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
        self._shard: _OpenShard | None = None
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "manifest.json").exists():
            _write_json(self.folder / "manifest.json", _manifest(spec))
        _require_same(self.folder, read_spec(self.folder), asdict(spec))
        for path in self.folder.glob(f"shard-{rank:05d}-*"):
            if not (path / "footer.json").exists():
                shutil.rmtree(path)
        self._skip = self.finished_ids()

    def finished_ids(self) -> Tensor:
        """Ids of the samples in finished shards, of all ranks; sorted int64."""
        shards = [_load_shard(path, self.spec) for path in _finished_shards(self.folder)]
        samples = torch.cat([torch.empty(0, dtype=torch.int64), *(shard["samples"] for shard in shards)])
        ids: Tensor = samples.unique()
        return ids

    def write(self, sample_ids: Tensor, values: Tensor | TopK, *, mask: Tensor | None = None) -> None:
        """Append a batch; samples that were in finished shards when the writer was made are passed over.

        Args:
            sample_ids: Identity of each sample in the data set, integers of shape ``(B,)``.
            values: Logits or hidden states, shape ``(B, width)``, or ``(B, T, width)`` with ``sequences``; or, for the
                kind "top_k", their :class:`TopK`. On any device: what is stored is computed there.
            mask: Which of the ``T`` rows exist (are no padding), boolean, shape ``(B, T)``; ``None`` for all.

        Raises:
            ValueError: If shapes do not fit the spec or each other, or the teacher's values are not finite.
            TypeError: If the ids are not integers.
        """
        samples = _to_ids(sample_ids)
        tensors = _top_k_planes(values) if isinstance(values, TopK) else {"values": values}
        first = next(iter(tensors.values()))
        shape, device = first.shape[:-1], first.device
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
        if isinstance(values, TopK):
            self._check_top_k(values)

        new = ~torch.isin(samples, self._skip)
        if not new.any():
            return
        keep = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.to(device)
        keep = keep & new.to(device).reshape(-1, *[1] * (keep.ndim - 1))
        # A mask that keeps everything would copy all logits for nothing.
        everything = bool(keep.all())
        kept = {
            name: tensor.flatten(0, keep.ndim - 1) if everything else _select(tensor, keep)
            for name, tensor in tensors.items()
        }
        planes = kept if isinstance(values, TopK) else self.spec.encode(kept["values"])
        lengths = keep.reshape(len(samples), -1).sum(dim=1).cpu()[new]
        self._append({"samples": samples[new], "lengths": lengths, **planes})

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
            self._shard = _OpenShard(self.folder / name, self.spec)
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
                f"`values` is the top {top_k.ids.shape[-1]} at temperatures {_listed(top_k.temperatures)}, but the "
                f"cache is of kind {spec.kind!r} with k={spec.k} at temperatures {_listed(spec.temperatures)}."
            )


class _OpenShard:
    """A shard that is being written: files that grow, and their checksums."""

    def __init__(self, path: Path, spec: CacheSpec) -> None:
        path.mkdir()
        self.path = path
        self.spec = spec
        self.samples = 0
        self.rows = 0
        self._files: dict[str, BinaryIO] = {name: open(path / f"{name}.bin", "wb") for name in _layout(spec)}  # noqa: SIM115
        self._digests = {name: hashlib.blake2b(digest_size=16) for name in self._files}

    def append(self, planes: dict[str, Tensor]) -> None:
        self.samples += len(planes["samples"])
        self.rows += int(planes["lengths"].sum())
        for name, (dtype, _) in _layout(self.spec).items():
            raw = _bytes(planes[name].to(dtype))
            self._files[name].write(raw)
            self._digests[name].update(raw)

    def abandon(self) -> None:
        for file in self._files.values():
            file.close()

    def publish(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        checksums = {name: digest.hexdigest() for name, digest in self._digests.items()}
        footer = {"cache": self.spec.address, "samples": self.samples, "rows": self.rows, "blake2b": checksums}
        _write_json(self.path / "footer.json", footer)


class CacheReader:
    """Read a cache, by sample id, in any order; all finished shards that there are when it is made.

    It may be handed to data loader workers, forked or spawned: it travels as a folder name and opens its files anew.

    Args:
        folder: What a :class:`CacheWriter` wrote.
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
        _require_same(self.folder, self.spec, {name: value for name, value in asked.items() if value is not None})
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
        for name, (dtype, _) in _row_layout(self.spec).items():
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
        return _from_planes(planes, self.spec)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "spec": self.spec, "_opened": None}

    def _open(self, verify: bool = False) -> _Opened:
        if self._opened is None:
            self._opened = _open_cache(self.folder, self.spec, verify)
        return self._opened

    def _find(self, sample_ids: Tensor | Sequence[int]) -> Tensor:
        ids = self._open().ids
        wanted = _to_ids(sample_ids)
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


def _manifest(spec: CacheSpec) -> dict[str, Any]:
    return {"version": FORMAT_VERSION, **asdict(spec)}


def _require_same(folder: Path, stored: CacheSpec, asked: dict[str, Any]) -> None:
    found = asdict(stored)
    differences = [
        f"`{name}` is {found[name]!r}, not {value!r}" for name, value in asked.items() if found[name] != value
    ]
    if differences:
        raise ValueError(
            f"The teacher cache {folder} holds something else than was asked for: {'; '.join(differences)}. "
            "Use what it was written with, or write a new cache in another folder."
        )


def _check_top_k(k: int, temperatures: Sequence[float], classes: int) -> tuple[float, ...]:
    if not 1 <= k <= classes:
        raise ValueError(f"`k` must be in [1, {classes}], the number of classes, got {k}.")
    if not len(temperatures) or not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"`temperatures` must be positive, and one at least, got {_listed(temperatures)}.")
    return tuple(float(temperature) for temperature in temperatures)


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"


def _id_dtype(classes: int) -> torch.dtype:
    return torch.uint16 if classes <= 2**16 else torch.int32


def _layout(spec: CacheSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and row shape of each plane; the first two have one entry per sample, the others one per row."""
    return {"samples": (torch.int64, ()), "lengths": (torch.int64, ()), **_row_layout(spec)}


def _row_layout(spec: CacheSpec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    if spec.kind == "top_k":
        return {
            "ids": (_id_dtype(spec.width), (spec.k,)),
            "deltas": (torch.float16, (spec.k,)),
            "tail": (torch.float32, (len(spec.temperatures),)),
        }
    return {"values": (_DTYPES[spec.dtype], (spec.width,))}


def _top_k_planes(top_k: TopK) -> dict[str, Tensor]:
    return {"ids": top_k.ids, "deltas": top_k.deltas, "tail": top_k.tail_logsumexp}


def _from_planes(planes: dict[str, Tensor], spec: CacheSpec) -> TopK | Tensor:
    if spec.kind == "top_k":
        return TopK(planes["ids"], planes["deltas"], planes["tail"], spec.temperatures)
    return planes["values"]


def _select(tensor: Tensor, keep: Tensor) -> Tensor:
    return tensor.view(_CARRIER.get(tensor.dtype, tensor.dtype))[keep].view(tensor.dtype)


def _to_ids(sample_ids: Tensor | Sequence[int]) -> Tensor:
    ids = torch.as_tensor(sample_ids)
    if ids.dtype == torch.bool or (ids.is_floating_point() and ids.numel() > 0):
        raise TypeError(f"`sample_ids` must be integers, got {ids.dtype}.")
    return ids.to("cpu", torch.int64).reshape(-1)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write so that readers see all of the file or none of it."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _finished_shards(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _SHARD.fullmatch(path.name) and (path / "footer.json").exists())


def _load_shard(path: Path, spec: CacheSpec, verify: bool = False) -> dict[str, Tensor]:
    """Map the planes of a shard, after a look at their sizes and, if wanted, checksums."""
    try:
        footer = json.loads((path / "footer.json").read_text())
        owner, counts, checksums = footer["cache"], (footer["samples"], footer["rows"]), footer["blake2b"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path / "footer.json", f"cannot be read ({error})") from error
    if owner != spec.address:
        raise _damaged(path / "footer.json", "belongs to another cache or is changed")
    planes = {}
    for name, (dtype, shape) in _layout(spec).items():
        file = path / f"{name}.bin"
        count = counts[0] if name in ("samples", "lengths") else counts[1]
        size = file.stat().st_size if file.exists() else 0
        expected = count * math.prod(shape) * dtype.itemsize
        if size != expected:
            raise _damaged(file, f"has {size} bytes instead of {expected}")
        if verify and _checksum(file) != checksums.get(name):
            raise _damaged(file, "differs from its checksum")
        planes[name] = _map(file, _CARRIER.get(dtype, dtype), (count, *shape))
    if int(planes["lengths"].sum()) != counts[1]:
        raise _damaged(path / "lengths.bin", "does not add up to the rows of the shard")
    return planes


def _damaged(file: Path, what: str) -> ValueError:
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


def _open_cache(folder: Path, spec: CacheSpec, verify: bool) -> _Opened:
    shards = [_load_shard(path, spec, verify) for path in _finished_shards(folder)]
    if not any(len(shard["samples"]) for shard in shards):
        raise ValueError(f"The teacher cache {folder} holds no finished shard yet. Run the job that writes it.")
    ids, lengths = (torch.cat([shard[name] for shard in shards]) for name in ("samples", "lengths"))
    starts = torch.cat([shard["lengths"].cumsum(0) - shard["lengths"] for shard in shards])
    numbers = torch.repeat_interleave(torch.tensor([len(shard["samples"]) for shard in shards]))
    ids, order = ids.sort(stable=True)
    opened = _Opened(shards, ids, numbers[order], starts[order], lengths[order])
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
    return _from_planes({name: planes[name][rows].view(dtype) for name, (dtype, _) in _row_layout(spec).items()}, spec)


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
