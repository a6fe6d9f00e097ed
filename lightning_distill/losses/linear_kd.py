"""The operator under the big-vocabulary losses: values and gradients of logits that never exist as a whole.

Items (tokens) are taken in chunks. A chunk's logits (the student's, and the teacher's where it has an output layer)
fill one tile each, the only large buffers. The softmaxes walk over a tile in blocks of a few rows that stay in the
processor's cache, in float32 or wider and in buffers that are used again (fresh ones cost more in page faults than in
arithmetic), and leave the gradient by the logits where the logits were. Two more matrix products make it the gradient
of the hidden states and of the output layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_distill.losses.top_k import NOTHING

MIB = 2**20


@torch.library.custom_op(  # opaque, because torch.compile would unroll the loop: about a second for each chunk
    "lightning_distill::linear_kd",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? teacher_hidden, Tensor? teacher_weight, "
    "Tensor? teacher_bias, Tensor? ids, Tensor? coarse, Tensor? labels, Tensor? mask, Tensor? temperatures, "
    "Tensor? hard_scale, Tensor? soft_scale, float temperature, float beta, float skew, bool scale_by_t2, "
    "int ignore_index, int vocabulary, int chunk_size, ScalarType dtype, ScalarType teacher_dtype, bool needs_hidden, "
    "bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def linear_kd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    ids: Tensor | None,
    coarse: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    temperatures: Tensor | None,
    hard_scale: Tensor | None,
    soft_scale: Tensor | None,
    temperature: float,
    beta: float,
    skew: float,
    scale_by_t2: bool,
    ignore_index: int,
    vocabulary: int,
    chunk_size: int,
    dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy and divergence of each item, and the gradient of ``sum(hard_scale * hard + soft_scale * soft)``.

    Args:
        hidden: Of the student, shape ``(N, d)``.
        weight: Of the student's output layer, shape ``(V, d)``.
        bias: Shape ``(V,)``.
        teacher_hidden: Shape ``(N, d_t)``; ``None`` for a teacher that is known by ``ids`` and ``coarse``, or for none.
        teacher_weight: Shape ``(V_t, d_t)``.
        teacher_bias: Shape ``(V_t,)``.
        ids: Kept classes, shape ``(N, k)``.
        coarse: Log-probabilities of the kept classes and of all others together, shape ``(N, k + 1)``.
        labels: Shape ``(N,)``.
        mask: Items to look at, shape ``(N,)``; the others get values and gradients of 0.
        temperatures: One for each item, shape ``(N,)``, in the place of ``temperature``.
        hard_scale: Shape ``(N,)``; ``None`` if no gradient is needed.
        soft_scale: Shape ``(N,)``; ``None`` if no gradient is needed.
        temperature: Of the divergence.
        beta: Of the generalized Jensen-Shannon divergence.
        skew: Of the skewed KL divergence, forward for a ``beta`` of 0 and reverse for 1; 0 otherwise.
        scale_by_t2: Whether to multiply the divergence by the square of the temperature.
        ignore_index: Label of an item without one.
        vocabulary: Number of rows of the output layers that take part.
        chunk_size: Largest number of items per tile.
        dtype: Of the student's matrix products.
        teacher_dtype: Of the teacher's matrix products.
        needs_hidden: Whether to compute the gradient of ``hidden``.
        needs_weight: Whether to compute the gradient of ``weight``.
        needs_bias: Whether to compute the gradient of ``bias``.

    Returns:
        ``hard`` and ``soft``, shape ``(N,)``; the gradients of ``hidden`` (in its dtype), ``weight`` and ``bias`` (in
        float32 or wider), without elements where they are not needed.
    """
    wide = torch.promote_types(dtype, torch.float32)
    hard, soft = hidden.new_zeros(len(hidden), dtype=wide), hidden.new_zeros(len(hidden), dtype=wide)
    grad_hidden = torch.zeros_like(hidden) if needs_hidden else hidden.new_empty(0)
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else weight.new_empty(0, dtype=wide)
    grad_bias = weight.new_zeros(len(weight) if needs_bias else 0, dtype=wide)

    items = torch.arange(len(hidden), device=hidden.device) if mask is None else mask.nonzero().squeeze(1)
    chunks = items.chunk(max(math.ceil(len(items) / chunk_size), 1))  # even, without a small rest
    student = _OutputLayer(weight, bias, vocabulary, dtype, len(chunks[0]))
    teacher: _DenseTeacher | _TopKTeacher | None = None
    if teacher_hidden is not None and teacher_weight is not None:
        layer = _OutputLayer(teacher_weight, teacher_bias, vocabulary, teacher_dtype, len(chunks[0]))
        teacher = _DenseTeacher(teacher_hidden, layer, beta, skew)
    elif ids is not None and coarse is not None:
        teacher = _TopKTeacher(ids, coarse.to(wide), beta)
    block_size = max(min(len(chunks[0]), _block_size(hidden.device.type, vocabulary)), 1)
    work = hidden.new_empty(5, block_size, vocabulary, dtype=wide)

    for chunk in chunks:
        inputs = hidden[chunk].to(dtype)
        tile = student.logits(inputs)
        if teacher is not None:
            teacher.read(chunk)
        for start in range(0, len(chunk), block_size):
            block = slice(start, start + block_size)
            rows, by_logits = chunk[block], tile[block]
            shifted, *free = work[:, : len(rows)]
            _shifted(by_logits, out=shifted)
            gradient = None
            if teacher is not None:
                t = temperature if temperatures is None else temperatures[rows, None].to(wide)
                t2 = t**2 if scale_by_t2 else 1.0
                scale = 1.0 if soft_scale is None else soft_scale[rows, None] * (t2 / t)
                value, gradient = teacher.compare(shifted, block, t, scale, free)
                soft[rows] = (t2 * value).squeeze(1)
            if labels is None:
                assert gradient is not None  # labels or a teacher
                by_logits.copy_(gradient)
                continue
            labelled = labels[rows, None] != ignore_index
            value, q, total = _cross_entropy(shifted, labels[rows, None].where(labelled, 0), out=free[3])
            hard[rows] = value.where(labelled, 0).squeeze(1)
            if hard_scale is not None:
                scale = hard_scale[rows, None].where(labelled, 0) / total
                if gradient is None:
                    torch.mul(q, scale, out=by_logits)
                else:
                    torch.addcmul(gradient, q, scale, out=by_logits)
        if needs_hidden:
            grad_hidden[chunk] = (tile @ student.weight).to(hidden.dtype)
        if needs_weight:
            _add_product(grad_weight[:vocabulary], tile, inputs)
        if needs_bias:
            grad_bias[:vocabulary] += tile.sum(dim=0, dtype=wide)
    return hard, soft, grad_hidden, grad_weight, grad_bias


@linear_kd.register_fake
def _shapes(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    dtype, _, needs_hidden, needs_weight, needs_bias = rest[-5:]
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty(len(hidden), dtype=wide),
        hidden.new_empty(len(hidden), dtype=wide),
        torch.empty_like(hidden) if needs_hidden else hidden.new_empty(0),
        torch.empty_like(weight, dtype=wide) if needs_weight else weight.new_empty(0, dtype=wide),
        weight.new_empty(len(weight) if needs_bias else 0, dtype=wide),
    )


class _OutputLayer:
    """An output layer in the dtype of the products, and the tile that its logits fill."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, vocabulary: int, dtype: torch.dtype, chunk_size: int
    ) -> None:
        self.weight = weight[:vocabulary].to(dtype)
        self.bias = None if bias is None else bias[:vocabulary].to(dtype)
        self.tile = self.weight.new_empty(chunk_size, vocabulary)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of a chunk: the tile, which the next call overwrites."""
        out = self.tile[: len(hidden)]
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


class _DenseTeacher:
    """A teacher with an output layer."""

    def __init__(self, hidden: Tensor, layer: _OutputLayer, beta: float, skew: float) -> None:
        self.hidden = hidden
        self.layer = layer
        self.divergence: Callable[[Tensor, Tensor, float | Tensor, list[Tensor]], tuple[Tensor, Tensor]]
        if skew:
            self.divergence = partial(_of_log_probs, partial(_skewed, beta=beta, skew=skew))
        else:
            self.divergence = partial(_of_log_probs, partial(_divergence, beta=beta)) if beta else _forward_kl

    def read(self, chunk: Tensor) -> None:
        """Compute the logits of a chunk."""
        self.logits = self.layer.logits(self.hidden[chunk].to(self.layer.weight.dtype))

    def compare(
        self, shifted: Tensor, block: slice, temperature: float | Tensor, scale: float | Tensor, work: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Divergence ``(rows, 1)`` of a block, and its gradient by the student's softened logits times ``scale``."""
        theirs = _shifted(self.logits[block], out=work[0])
        u, v = _softened(shifted, temperature, out=work[1]), _softened(theirs, temperature, out=work[0])
        return self.divergence(u, v, scale, [work[1], *work[2:]])


class _TopKTeacher:
    """A teacher of which ``k`` classes are known, compared over ``k + 1`` outcomes: these classes and all others."""

    def __init__(self, ids: Tensor, coarse: Tensor, beta: float) -> None:
        self.ids = ids
        self.coarse = coarse
        self.beta = beta

    def read(self, chunk: Tensor) -> None:
        """Fetch what is known of a chunk."""
        self.chunk = self.ids[chunk], self.coarse[chunk]

    def compare(
        self, shifted: Tensor, block: slice, temperature: float | Tensor, scale: float | Tensor, work: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Divergence ``(rows, 1)`` of a block, and its gradient by the student's softened logits times ``scale``."""
        ids, log_p = (x[block] for x in self.chunk)
        others = torch.mul(shifted, 1 / temperature, out=work[0])
        kept = others.gather(1, ids)
        others.scatter_(1, ids, NOTHING)
        largest = others.amax(1, keepdim=True)
        rest = others.sub_(largest).exp_()
        total = rest.sum(1, keepdim=True)
        log_q = torch.log_softmax(torch.cat([kept, largest + total.log()], dim=1), -1)
        value = _divergence(log_q, log_p, list(log_q.new_empty(2, *log_q.shape)), beta=self.beta)
        log_q.mul_(scale)
        return value, rest.mul_(log_q[:, -1:] / total).scatter_(1, ids, log_q[:, :-1])


def _forward_kl(u: Tensor, v: Tensor, scale: float | Tensor, work: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Forward KL divergence ``(rows, 1)`` of softened logits that end at 0, and ``scale * (q - p)``.

    Without logarithms of the probabilities: two passes less than :func:`_divergence`. ``v`` is overwritten.
    """
    p = torch.exp(v, out=work[1])
    total_p = p.sum(1, keepdim=True)
    value = _dot(p, v.sub_(u), out=v).div_(total_p)
    q = torch.exp(u, out=work[0])
    total_q = q.sum(1, keepdim=True)
    value += (total_q / total_p).log()
    return value, q.mul_(scale / total_q).addcmul_(p, -scale / total_p)


def _of_log_probs(
    divergence: Callable[[Tensor, Tensor, list[Tensor]], Tensor],
    u: Tensor,
    v: Tensor,
    scale: float | Tensor,
    work: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """A divergence of log-probabilities, of softened logits that end at 0, and its gradient times ``scale``."""
    total_q, total_p = (torch.exp(x, out=work[1]).sum(1, keepdim=True) for x in (u, v))
    log_q, log_p = torch.sub(u, total_q.log_(), out=work[0]), v.sub_(total_p.log_())
    value = divergence(log_q, log_p, work[1:])
    return value, log_q.mul_(scale)


def _divergence(log_q: Tensor, log_p: Tensor, work: list[Tensor], *, beta: float) -> Tensor:
    """Generalized Jensen-Shannon divergence ``(rows, 1)``; its gradient by the softened logits replaces ``log_q``.

    With student ``q``, teacher ``p`` and mixture ``m`` the gradient is ``q - p`` for the forward KL divergence,
    ``q * (log(q / p) - KL(q || p))`` for the reverse, and ``(1 - beta) * q * (log(q / m) - KL(q || m))`` between them:
    that ``m`` depends on ``q`` adds a constant, which the softmax removes. ``log_p`` and ``work`` are overwritten.
    """
    if beta == 0:
        p = torch.exp(log_p, out=work[0])
        value = _dot(p, log_p.sub_(log_q), out=work[1])
        log_q.exp_().sub_(p)
        return value
    if beta == 1:
        q = torch.exp(log_q, out=work[0])
        value = _dot(q, log_q.sub_(log_p), out=work[1])
        log_q.sub_(value).mul_(q)
        return value
    odds = math.log(beta) - math.log1p(-beta)
    log_m = torch.logaddexp(log_q, torch.add(log_p, odds, out=work[1]), out=work[0]).add_(math.log1p(-beta))
    p = torch.exp(log_p, out=work[1])
    from_teacher = _dot(p, log_p.sub_(log_m), out=work[1])
    q = torch.exp(log_q, out=work[1])
    from_student = _dot(q, log_q.sub_(log_m), out=log_p)
    log_q.sub_(from_student).mul_(q).mul_(1 - beta)
    return beta * from_teacher + (1 - beta) * from_student


def _skewed(log_q: Tensor, log_p: Tensor, work: list[Tensor], *, beta: float, skew: float) -> Tensor:
    """Skewed KL divergence ``(rows, 1)``; its gradient by the softened logits replaces ``log_q``.

    Forward, with the mixture ``m = skew * p + (1 - skew) * q`` and the student's share ``a = (1 - skew) * q / m`` in
    it, the gradient is ``q * sum(p * a) - p * a``. Reverse, with ``m = skew * q + (1 - skew) * p`` and
    ``b = skew * q / m``, it is ``q * (log(q / m) - KL(q || m) - b + sum(q * b))``. ``log_p`` and ``work`` are
    overwritten.
    """
    less, more = math.log(skew), math.log1p(-skew)
    if beta == 0:
        log_m = torch.logaddexp(torch.add(log_p, less, out=work[0]), torch.add(log_q, more, out=work[1]), out=work[0])
        p = torch.exp(log_p, out=work[1])
        value = _dot(p, log_p.sub_(log_m), out=log_p)
        taught = torch.sub(log_q, log_m, out=work[0]).add_(more).exp_().mul_(p)
        log_q.exp_().mul_(taught.sum(dim=1, keepdim=True)).sub_(taught)
        return value
    log_m = torch.logaddexp(torch.add(log_q, less, out=work[0]), log_p.add_(more), out=work[0])
    q = torch.exp(log_q, out=work[1])
    ratio = log_q.sub_(log_m)
    own = torch.exp(ratio, out=work[0]).mul_(skew)
    mean_own = _dot(q, own, out=log_p)
    value = _dot(q, ratio, out=log_p)
    log_q.sub_(value).sub_(own).add_(mean_own).mul_(q)
    return value


def _cross_entropy(shifted: Tensor, classes: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy against ``classes``, both ``(rows, 1)``, and its gradient but for a division by a total.

    The total ``(rows, 1)`` is returned too: the division goes into what the gradient is multiplied with anyway.
    """
    q = torch.exp(shifted, out=out)
    total = q.sum(1, keepdim=True)
    value = total.log() - shifted.gather(1, classes)
    return value, q.scatter_add_(1, classes, -total), total


def _shifted(logits: Tensor, *, out: Tensor) -> Tensor:
    """Logits minus the largest of each row, in the dtype of ``out``: their exponentials add up to 1 at least."""
    source = logits if logits.dtype == out.dtype else out.copy_(logits)
    return torch.sub(source, source.amax(1, keepdim=True), out=out)


def _softened(shifted: Tensor, temperature: float | Tensor, *, out: Tensor) -> Tensor:
    """``shifted / T``: after the maximum was subtracted, so that no difference is rounded away."""
    unchanged = isinstance(temperature, float) and temperature == 1
    return shifted if unchanged else torch.mul(shifted, 1 / temperature, out=out)


def _dot(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """Dot product of each row, ``(rows, 1)``. Not a matrix product, whose precision users turn down (TF32)."""
    return torch.mul(left, right, out=out).sum(dim=1, keepdim=True)


def _add_product(total: Tensor, tile: Tensor, inputs: Tensor) -> None:
    """``total += tile.T @ inputs``, in slices where the product is narrower than ``total``."""
    if tile.dtype == total.dtype:
        total.addmm_(tile.t(), inputs)
        return
    rows = max(32 * MIB // (inputs.shape[1] * inputs.element_size()), 1)
    for part, columns in zip(total.split(rows), tile.split(rows, dim=1), strict=True):
        part.add_(columns.t() @ inputs)


def default_chunk_size(device: str, vocabulary: int, dtype: torch.dtype) -> int:
    """Items per tile: what fits 40 MiB on the CPU, but at least 128 (products of fewer are slow); 256 MiB elsewhere."""
    if device == "cpu":
        return max(40 * MIB // (vocabulary * dtype.itemsize), 128)
    return max(256 * MIB // (vocabulary * dtype.itemsize), 1)


def _block_size(device: str, vocabulary: int) -> int:
    """Rows of a block: 1/2 MiB for each thread, so that its cache holds several, or what outlasts a kernel launch."""
    if device == "cpu":
        threads = torch.get_num_threads()
        return max(threads * MIB // (8 * vocabulary), threads)
    return max(32 * MIB // (4 * vocabulary), 1)
