"""The largest logits of each row and the mass of all others: what is kept of a teacher when all logits are too many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = math.log(torch.finfo(torch.float32).tiny)
"""Least log-probability of a tail: it keeps `p * log(p)` finite where the stored classes have all the mass."""

_CHUNK = {"cpu": 2**22}  # logits that the encoder widens at a time: what fits the caches of a processor
_CHUNK_ELSEWHERE = 2**25


class TopK(NamedTuple):
    """The `k` largest logits of each row and, per temperature, the mass of all others.

    Attributes:
        ids: Classes in order of falling logit, shape ``(rows..., k)``; uint16 up to 65536 classes, else int32.
        deltas: Their logits minus the row's largest, float16, same shape; the first is 0.
        tail_logsumexp: ``log(sum(exp(delta / T)))`` over the other classes, float32, shape
            ``(rows..., len(temperatures))``; minus infinity where there are none.
        temperatures: At which the tail is known.
        classes: Of which the kept ones are the largest.
    """

    ids: Tensor
    deltas: Tensor
    tail_logsumexp: Tensor
    temperatures: tuple[float, ...]
    classes: int


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
    stored = check_top_k(k, temperatures, classes)
    rows = logits.detach().reshape(-1, classes)
    size = max(1, _CHUNK.get(logits.device.type, _CHUNK_ELSEWHERE) // classes)
    parts = [_encode_rows(rows[i : i + size], k, stored) for i in range(0, max(1, len(rows)), size)]
    planes = (torch.cat(plane) for plane in zip(*parts, strict=True))
    ids, deltas, tail = (plane.reshape(*logits.shape[:-1], plane.shape[-1]) for plane in planes)
    return TopK(ids.to(id_dtype(classes)), deltas, tail, stored, classes)


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
        f"`temperature` must be one that the teacher's tail was stored at, {listed(temperatures)}, got "
        f"{temperature}: the tail cannot be computed from another temperature's. Train at a stored temperature, or "
        f"write the cache again with {temperature} among `temperatures`."
    )


def check_top_k(k: int, temperatures: Sequence[float], classes: int) -> tuple[float, ...]:
    """``temperatures`` as numbers, if the top ``k`` of ``classes`` can be stored at them.

    Raises:
        ValueError: If not.
    """
    if not 1 <= k <= classes:
        raise ValueError(f"`k` must be in [1, {classes}], the number of classes, got {k}.")
    if not len(temperatures) or not all(0 < temperature < math.inf for temperature in temperatures):
        raise ValueError(f"`temperatures` must be positive, and one at least, got {listed(temperatures)}.")
    return tuple(float(temperature) for temperature in temperatures)


def listed(values: Iterable[float]) -> str:
    """Numbers as an error message shows them."""
    return ", ".join(f"{value:g}" for value in values) or "none"


def id_dtype(classes: int) -> torch.dtype:
    """The smallest that holds all class indices."""
    return torch.uint16 if classes <= 2**16 else torch.int32
