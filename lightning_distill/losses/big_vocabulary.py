"""Distillation over vocabularies of 100k tokens and more, without the ``(tokens, vocabulary)`` matrices.

A language model's logits are ``hidden @ weight.T``, and the plain loss on them holds seven matrices of their size. The
losses here read hidden states and output layers instead, go over a chunk of tokens at a time, and turn the logits of a
chunk into their gradient in place. What takes memory is the gradient of the output layer, that of the hidden states,
and two tiles of logits; in time there is little but the matrix products.

==================================  =================================  ==========================  ===============
function                            teacher                            gradient                    matrix products
==================================  =================================  ==========================  ===============
:func:`fused_linear_kd`             hidden states and output layer     computed with the value     4
:func:`sparse_kd`                   top-k probabilities, from a cache  computed with the value     3
:func:`fused_linear_cross_entropy`  none: the control group            computed with the value     3
:func:`fused_linear_kd_items`       hidden states and output layer     recomputed in ``backward``  6
:func:`sparse_kd_items`             top-k probabilities, from a cache  recomputed in ``backward``  4
==================================  =================================  ==========================  ===============

The first three give one scalar and must know every weight beforehand. The ``_items`` give one value per token, to be
weighted by anything (selective distillation, learned weights of the terms).

Softmaxes and sums are computed in float32 or wider, matrix products in the dtype of autocast or else of the inputs; the
gradient of the output layer is accumulated in float32 or wider. ``torch.compile`` sees one opaque operator. Where the
seven matrices stay below some 256 MB, the plain loss is as good.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_distill.losses.linear_kd import default_chunk_size, linear_kd
from lightning_distill.losses.soft_targets import check_skew
from lightning_distill.losses.top_k import coarse_log_probs
from lightning_distill.measuring import is_measuring
from lightning_distill.outputs import UNLABELLED


class FusedLoss(NamedTuple):
    """What :func:`fused_linear_kd` and :func:`sparse_kd` return; scalars.

    Attributes:
        loss: ``alpha * hard + (1 - alpha) * soft``, the only one with a gradient.
        hard: Cross-entropy against the labels, nats; detached.
        soft: Divergence from the teacher, nats, times ``T ** 2`` unless switched off; detached.
    """

    loss: Tensor
    hard: Tensor
    soft: Tensor


class KDItems(NamedTuple):
    """What :func:`fused_linear_kd_items` and :func:`sparse_kd_items` return; shape of the items, both with a gradient.

    Attributes:
        hard: Cross-entropy against the label, nats; 0 where there is none and where the mask is false.
        soft: Divergence from the teacher, nats, times ``T ** 2`` unless switched off; 0 where the mask is false.
    """

    hard: Tensor
    soft: Tensor


def fused_linear_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float = 0.5,
    beta: float = 0.0,
    skew: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = UNLABELLED,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    count: float | Tensor | None = None,
    vocabulary: int | None = None,
    chunk_size: int | None = None,
) -> FusedLoss:
    r"""Cross-entropy and divergence from a teacher, from hidden states, as one scalar.

    .. math::
        L = \frac{1}{\text{count}} \sum_i w_i \left[ \alpha \, \mathrm{CE}(q_i, y_i)
        + (1 - \alpha) \, T^2 D_\beta(p_{i,T}, q_{i,T}) \right], \qquad q = \sigma(h^s W_s^\top + b_s)

    The gradient is computed together with the value, so that student and teacher are projected once: exactly the four
    matrix products that the gradient needs. It is used up by the first ``backward``. With ``torch.no_grad`` or inputs
    that need no gradient, only the value is computed.

    ``D_beta`` is the forward KL divergence for ``beta=0``, the reverse for ``beta=1``, and between them the generalized
    Jensen-Shannon divergence of :func:`~lightning_distill.losses.jensen_shannon_divergence`.

    The losses are a *sum* over the items that count, divided by ``count``. By default that is the number of those items
    here; give the number of the whole optimizer step (over micro-batches and ranks) to get the gradient of its mean.
    An item without a label adds 0 to ``hard``, but does count and is distilled. What must not count at all (padding,
    prompts) is left out by ``mask`` and costs nothing: only the other items are projected.

    Args:
        student_hidden: Last hidden states, shape ``(items..., d)``; gets a gradient.
        student_weight: Output layer, shape ``(V, d)``; gets a gradient unless frozen.
        teacher_hidden: Last hidden states, shape ``(items..., d_t)``; no gradient.
        teacher_weight: Output layer, shape ``(V_t, d_t)``; no gradient. May have another dtype than the student's.
        labels: Class indices of the shape of the items, ``ignore_index`` where there is none; ``None`` for no labels.
        temperature: ``T > 0`` of ``D_beta``; a number, or one value per item, shape of the items.
        alpha: Weight of the cross-entropy, in [0, 1]; the divergence gets ``1 - alpha``.
        beta: In [0, 1]; 0 forward KL, 1 reverse KL.
        skew: In [0, 1), of the skewed KL divergence :func:`~lightning_distill.losses.skewed_kl_divergence`; only with
            a ``beta`` of 0 (forward) or 1 (reverse).
        scale_by_t2: Whether to multiply the divergence by ``T ** 2``.
        ignore_index: Label of an item that has none.
        student_bias: Of the output layer, shape ``(V,)``; gets a gradient.
        teacher_bias: Of the output layer, shape ``(V_t,)``.
        mask: Which items count, boolean, shape of the items; ``None`` for all.
        weights: Weight of each item, shape of the items, no gradient. Weights do not change ``count``.
        count: What the sums are divided by. By default the number of items that count, at least 1.
        vocabulary: True size of a vocabulary that the output layers pad to different sizes; rows from there on take no
            part. Needed if ``V`` and ``V_t`` differ.
        chunk_size: Items per tile. By default as many as fit 40 MiB on the CPU (but 128 at least: smaller products are
            slow) and 256 MiB elsewhere.

    Returns:
        ``loss`` (with the gradient), ``hard`` and ``soft`` (detached), scalars in float32 or wider; 0, with a graph, if
        no item counts.

    Raises:
        ValueError: If shapes, dtypes or vocabularies do not fit, or a number is outside its range.
        RuntimeError: In ``backward``, if it is called a second time.

    Example:
        >>> hidden, head = torch.randn(6, 8, requires_grad=True), torch.nn.Linear(8, 100, bias=False)
        >>> teacher_hidden, teacher_head = torch.randn(6, 16), torch.nn.Linear(16, 100, bias=False)
        >>> labels = torch.tensor([3, 14, 15, 92, 65, -100])
        >>> result = fused_linear_kd(hidden, head.weight, teacher_hidden, teacher_head.weight, labels, temperature=2.0)
        >>> result.loss.backward()
        >>> head.weight.grad.shape
        torch.Size([100, 8])
    """
    teacher = _dense_teacher(student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_bias, vocabulary)
    problem = _problem(
        student_hidden, student_weight, student_bias, teacher, labels, mask, temperature, beta, skew, scale_by_t2,
        ignore_index, chunk_size,
    )  # fmt: skip
    return _combined(problem, alpha, weights, count)


def fused_linear_kd_items(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    beta: float = 0.0,
    skew: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = UNLABELLED,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    vocabulary: int | None = None,
    chunk_size: int | None = None,
) -> KDItems:
    """Cross-entropy and divergence from a teacher of each item, from hidden states.

    The values may be weighted and combined in any differentiable way, and ``backward`` may be called more than once:
    it projects student and teacher again, which makes six matrix products where :func:`fused_linear_kd` has four.
    Items whose two gradients are 0 (a token that was not selected) are not projected again.

    Args:
        student_hidden: As all others, see :func:`fused_linear_kd`.
        student_weight: Shape ``(V, d)``.
        teacher_hidden: Shape ``(items..., d_t)``.
        teacher_weight: Shape ``(V_t, d_t)``.
        labels: Shape of the items.
        temperature: Of the divergence.
        beta: 0 forward KL, 1 reverse KL.
        skew: In [0, 1), of the skewed KL divergence :func:`~lightning_distill.losses.skewed_kl_divergence`; only with
            a ``beta`` of 0 (forward) or 1 (reverse).
        scale_by_t2: Whether to multiply the divergence by ``T ** 2``.
        ignore_index: Label of an item that has none.
        student_bias: Shape ``(V,)``.
        teacher_bias: Shape ``(V_t,)``.
        mask: Which items count.
        vocabulary: True size of padded vocabularies.
        chunk_size: Items per tile.

    Returns:
        ``hard`` and ``soft``, shape of the items, in float32 or wider.

    Raises:
        ValueError: As :func:`fused_linear_kd`.
    """
    teacher = _dense_teacher(student_hidden, student_weight, teacher_hidden, teacher_weight, teacher_bias, vocabulary)
    problem = _problem(
        student_hidden, student_weight, student_bias, teacher, labels, mask, temperature, beta, skew, scale_by_t2,
        ignore_index, chunk_size,
    )  # fmt: skip
    return _items(problem)


def sparse_kd(
    student_hidden: Tensor,
    student_weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail_log_prob: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    alpha: float = 0.5,
    beta: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = UNLABELLED,
    student_bias: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    count: float | Tensor | None = None,
    vocabulary: int | None = None,
    chunk_size: int | None = None,
) -> FusedLoss:
    """Cross-entropy and divergence from a teacher's ``k`` most probable tokens, from hidden states, as one scalar.

    :func:`fused_linear_kd` with the divergence of :func:`~lightning_distill.losses.topk_kl`. Without a teacher to run
    it takes one matrix product less.

    Args:
        student_hidden: Last hidden states, shape ``(items..., d)``; gets a gradient.
        student_weight: Output layer, shape ``(V, d)``; gets a gradient unless frozen.
        ids: See :func:`~lightning_distill.losses.topk_kl`; shape ``(items..., k)``.
        log_probs: See :func:`~lightning_distill.losses.topk_kl`; shape ``(items..., k)``, *at the given temperature*.
        tail_log_prob: See :func:`~lightning_distill.losses.topk_kl`; shape of the items, or ``None``.
        labels: As all others, see :func:`fused_linear_kd`.
        temperature: Of the divergence.
        alpha: Weight of the cross-entropy.
        beta: 0 forward KL, 1 reverse KL.
        scale_by_t2: Whether to multiply the divergence by ``T ** 2``.
        ignore_index: Label of an item that has none.
        student_bias: Shape ``(V,)``.
        mask: Which items count.
        weights: Weight of each item.
        count: What the sums are divided by.
        vocabulary: True size, if the student's output layer is padded; rows from there on take no part.
        chunk_size: Items per tile.

    Returns:
        ``loss`` (with the gradient), ``hard`` and ``soft`` (detached), scalars in float32 or wider.

    Raises:
        ValueError: As :func:`fused_linear_kd` and :func:`~lightning_distill.losses.topk_kl`.
        RuntimeError: In ``backward``, if it is called a second time.
    """
    teacher = _top_k_teacher(student_hidden, student_weight, ids, log_probs, tail_log_prob, vocabulary, beta)
    problem = _problem(
        student_hidden, student_weight, student_bias, teacher, labels, mask, temperature, beta, 0.0, scale_by_t2,
        ignore_index, chunk_size,
    )  # fmt: skip
    return _combined(problem, alpha, weights, count)


def sparse_kd_items(
    student_hidden: Tensor,
    student_weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail_log_prob: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    beta: float = 0.0,
    scale_by_t2: bool = True,
    ignore_index: int = UNLABELLED,
    student_bias: Tensor | None = None,
    mask: Tensor | None = None,
    vocabulary: int | None = None,
    chunk_size: int | None = None,
) -> KDItems:
    """Cross-entropy and divergence from a teacher's ``k`` most probable tokens of each item, from hidden states.

    :func:`fused_linear_kd_items` with the divergence of :func:`~lightning_distill.losses.topk_kl`.

    Args:
        student_hidden: Last hidden states, shape ``(items..., d)``; gets a gradient.
        student_weight: Output layer, shape ``(V, d)``; gets a gradient unless frozen.
        ids: See :func:`~lightning_distill.losses.topk_kl`; shape ``(items..., k)``.
        log_probs: See :func:`~lightning_distill.losses.topk_kl`; shape ``(items..., k)``, *at the given temperature*.
        tail_log_prob: See :func:`~lightning_distill.losses.topk_kl`; shape of the items, or ``None``.
        labels: As all others, see :func:`fused_linear_kd`.
        temperature: Of the divergence.
        beta: 0 forward KL, 1 reverse KL.
        scale_by_t2: Whether to multiply the divergence by ``T ** 2``.
        ignore_index: Label of an item that has none.
        student_bias: Shape ``(V,)``.
        mask: Which items count.
        vocabulary: True size, if the student's output layer is padded.
        chunk_size: Items per tile.

    Returns:
        ``hard`` and ``soft``, shape of the items, in float32 or wider.

    Raises:
        ValueError: As :func:`fused_linear_kd` and :func:`~lightning_distill.losses.topk_kl`.
    """
    teacher = _top_k_teacher(student_hidden, student_weight, ids, log_probs, tail_log_prob, vocabulary, beta)
    problem = _problem(
        student_hidden, student_weight, student_bias, teacher, labels, mask, temperature, beta, 0.0, scale_by_t2,
        ignore_index, chunk_size,
    )  # fmt: skip
    return _items(problem)


def fused_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = UNLABELLED,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    count: float | Tensor | None = None,
    vocabulary: int | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Cross-entropy from hidden states, as one scalar: what :func:`fused_linear_kd` is without a teacher.

    For a student trained alone with a vocabulary so large that its logits would not fit: it takes no more memory than
    its distilled twin. An item without a label adds 0 but does count, as it does in :func:`fused_linear_kd`.

    Args:
        hidden: Last hidden states, shape ``(items..., d)``; gets a gradient.
        weight: Output layer, shape ``(V, d)``; gets a gradient unless frozen.
        labels: Class indices, shape of the items; ``ignore_index`` where there is none.
        ignore_index: Label of an item that has none.
        bias: Of the output layer, shape ``(V,)``; gets a gradient.
        mask: As all others, see :func:`fused_linear_kd`.
        weights: Weight of each item.
        count: What the sum is divided by.
        vocabulary: True size, if the output layer is padded.
        chunk_size: Items per tile.

    Returns:
        Nats, scalar in float32 or wider.

    Raises:
        ValueError: As :func:`fused_linear_kd`.
        RuntimeError: In ``backward``, if it is called a second time.

    Example:
        >>> hidden, head = torch.zeros(2, 8, requires_grad=True), torch.nn.Linear(8, 100, bias=False)
        >>> fused_linear_cross_entropy(hidden, head.weight, torch.tensor([3, 14]))
        tensor(4.6052, grad_fn=<DivBackward0>)
    """
    _check_layer("student", hidden, weight)
    teacher = _Teacher((None,) * 5, hidden.dtype, _true_size(vocabulary, len(weight)))
    problem = _problem(
        hidden, weight, bias, teacher, labels, mask, 1.0, 0.0, 0.0, True, ignore_index, chunk_size
    )  # fmt: skip
    return _combined(problem, 1.0, weights, count).loss


MASK = 6
"""Position of the mask among a problem's tensors."""


class _Teacher(NamedTuple):
    """What the operator takes of a teacher: hidden states and output layer, or ids and coarse log-probabilities."""

    tensors: tuple[Tensor | None, ...]  # hidden, weight, bias, ids, coarse
    dtype: torch.dtype
    vocabulary: int


class _Problem(NamedTuple):
    """The operator's arguments but for the scales, checked, with one dimension of items (of the shape ``items``)."""

    items: torch.Size
    student: tuple[Tensor, Tensor, Tensor | None]
    tensors: tuple[Tensor | None, ...]  # of the teacher, then labels, mask and temperatures
    options: tuple[Any, ...]


def _dense_teacher(
    student_hidden: Tensor,
    student_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: int | None,
) -> _Teacher:
    _check_layer("student", student_hidden, student_weight)
    if hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"`teacher_hidden` has items of shape {tuple(hidden.shape[:-1])}, `student_hidden` of shape "
            f"{tuple(student_hidden.shape[:-1])}; both must see the same batch."
        )
    _check_layer("teacher", hidden, weight)
    _check_bias("teacher", bias, weight)
    sizes = student_weight.shape[0], weight.shape[0]
    if vocabulary is None and sizes[0] != sizes[1]:
        raise ValueError(
            f"The student's vocabulary has {sizes[0]} entries, the teacher's {sizes[1]}. If they share a tokenizer and "
            f"the surplus is padding, pass the true size: `vocabulary={min(sizes)}` (or less, see `len(tokenizer)`)."
        )
    tensors = (hidden.detach().reshape(-1, hidden.shape[-1]), weight.detach(), bias, None, None)
    return _Teacher(tensors, _compute_dtype(hidden), _true_size(vocabulary, min(sizes)))


def _top_k_teacher(
    student_hidden: Tensor,
    student_weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    tail_log_prob: Tensor | None,
    vocabulary: int | None,
    beta: float,
) -> _Teacher:
    _check_layer("student", student_hidden, student_weight)
    coarse = coarse_log_probs(student_hidden.shape[:-1], ids, log_probs, tail_log_prob, beta=beta)
    k = ids.shape[-1]
    tensors = (None, None, None, ids.reshape(-1, k).long(), coarse.reshape(-1, k + 1))
    return _Teacher(tensors, coarse.dtype, _true_size(vocabulary, len(student_weight)))


def _problem(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: _Teacher,
    labels: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    beta: float,
    skew: float,
    scale_by_t2: bool,
    ignore_index: int,
    chunk_size: int | None,
) -> _Problem:
    _check_bias("student", bias, weight)
    if not 0 <= beta <= 1:
        raise ValueError(f"`beta` must be in [0, 1], got {beta}.")
    check_skew(skew, beta)
    if chunk_size is not None and not chunk_size > 0:
        raise ValueError(f"`chunk_size` must be positive, got {chunk_size}.")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"`mask` must be boolean, got {mask.dtype}: use `mask.bool()`.")
    items = hidden.shape[:-1]
    temperatures = None
    if isinstance(temperature, Tensor):
        if temperature.ndim > 0:
            temperatures = _flat("temperature", temperature.detach(), items)
        else:
            temperatures = temperature.detach().expand(items.numel())
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
    if labels is not None:
        labels = _flat("labels", labels, items).long()
    if mask is not None:
        mask = _flat("mask", mask, items)
    dtype = _compute_dtype(hidden)
    size = chunk_size or default_chunk_size(hidden.device.type, teacher.vocabulary, dtype)
    number = 1.0 if isinstance(temperature, Tensor) else float(temperature)
    return _Problem(
        items,
        (hidden.reshape(-1, hidden.shape[-1]), weight, bias),
        (*teacher.tensors, labels, mask, temperatures),
        (number, float(beta), float(skew), scale_by_t2, ignore_index, teacher.vocabulary, size, dtype, teacher.dtype),
    )


def _combined(problem: _Problem, alpha: float, weights: Tensor | None, count: float | Tensor | None) -> FusedLoss:
    """Value and gradient of the weighted sum, in one pass."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}.")
    hidden, weight, bias = problem.student
    tensors, mask = list(problem.tensors), problem.tensors[MASK]
    if count is None:
        count = max(len(hidden), 1) if mask is None else mask.sum().clamp_min(1)
    scale = hidden.new_ones(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    if weights is not None:
        if weights.requires_grad:
            raise ValueError(
                "`weights` get no gradient here: detach them, or weight the values of `fused_linear_kd_items` or "
                "`sparse_kd_items`."
            )
        scale = _flat("weights", weights, problem.items).to(scale.dtype)
        used = scale != 0
        tensors[MASK] = used if mask is None else used & mask
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in problem.student]
    with torch.no_grad():
        scales = (alpha * scale, (1 - alpha) * scale) if any(needs) else (None, None)
        hard_items, soft_items, *gradients = linear_kd(*problem.student, *tensors, *scales, *problem.options, *needs)
        hard, soft = (hard_items * scale).sum(), (soft_items * scale).sum()
        loss = alpha * hard + (1 - alpha) * soft
    if any(needs):
        loss = _GradientsAtHand.apply(hidden, weight, bias, loss, *gradients)  # type: ignore[no-untyped-call]
    return FusedLoss(loss / count, hard / count, soft / count)


def _items(problem: _Problem) -> KDItems:
    """Value of each item now, gradients when they are asked for."""
    hard, soft = _Recompute.apply(*problem.student, *problem.tensors, problem.options)  # type: ignore[no-untyped-call]
    return KDItems(hard.reshape(problem.items), soft.reshape(problem.items))


class _GradientsAtHand(torch.autograd.Function):
    """A scalar whose gradients are known already.

    They are taken off the context and scaled in place. ``save_for_backward`` would keep a reference to them, which
    makes scaling and accumulation copy the largest tensor of all; this way it becomes ``weight.grad`` itself.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, value: Tensor, *gradients: Tensor
    ) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradient of a fused distillation loss is computed with its value and used up by the first "
                "backward. To go backward again (`retain_graph=True`, gradient norms of single terms), do it within "
                "`lightning_distill.measuring.measuring()`, or use `fused_linear_kd_items` or `sparse_kd_items`, which "
                "compute it anew."
            )
        gradients, keep = ctx.gradients, is_measuring()
        if not keep:
            ctx.gradients = None
        scaled = [
            (x * gradient if keep else x.mul_(gradient)).to(dtype) if needed else None
            for x, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad, strict=False)
        ]
        return (*scaled, None, None, None, None)


class _Recompute(torch.autograd.Function):
    """Values of the items; ``backward`` runs the operator again with what each value is worth."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        *tensors, options = rest
        ctx.save_for_backward(hidden, weight, bias, *tensors)
        ctx.options = options
        hard, soft, *_ = linear_kd(hidden, weight, bias, *tensors, None, None, *options, False, False, False)
        return hard, soft

    @staticmethod
    def backward(ctx: Any, hard_scale: Tensor, soft_scale: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        hidden, weight, bias, *tensors = ctx.saved_tensors
        student, needs = (hidden, weight, bias), ctx.needs_input_grad[:3]
        used = (hard_scale != 0) | (soft_scale != 0)
        tensors[MASK] = used if tensors[MASK] is None else used & tensors[MASK]
        _, _, *gradients = linear_kd(*student, *tensors, hard_scale, soft_scale, *ctx.options, *needs)
        typed = [g.to(x.dtype) if needed else None for g, x, needed in zip(gradients, student, needs, strict=True)]
        return (*typed, *(None for _ in tensors), None)


def _refuse_second_derivatives() -> None:
    """Say so under ``create_graph=True``; ``once_differentiable`` returns gradients cut off from the graph instead."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "The big-vocabulary losses have no second derivatives, so `create_graph=True` cannot go through them. Use "
            "the losses on logits, or backward without it."
        )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the matrix products: that of autocast, which leaves float64 alone, or else that of the inputs."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _true_size(vocabulary: int | None, largest: int) -> int:
    if vocabulary is None:
        return largest
    if not 0 < vocabulary <= largest:
        raise ValueError(
            f"`vocabulary` must be from 1 to {largest}, the size of the smallest output layer, got {vocabulary}."
        )
    return vocabulary


def _flat(name: str, value: Tensor, items: torch.Size) -> Tensor:
    if value.shape != items:
        raise ValueError(f"`{name}` must have the shape of the items, {tuple(items)}, got {tuple(value.shape)}.")
    return value.reshape(-1)


def _check_layer(side: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`{side}_hidden` must have the shape (items..., d) and `{side}_weight` (V, d), got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}."
        )
    if not hidden.is_floating_point():
        raise ValueError(f"`{side}_hidden` must be floating-point, got {hidden.dtype}.")
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"`{side}_hidden` is {hidden.dtype} and `{side}_weight` {weight.dtype}. Outside autocast they must be "
            "equal: convert one, or train with a mixed `precision`."
        )


def _check_bias(side: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`{side}_bias` must have the shape ({weight.shape[0]},), got {tuple(bias.shape)}.")
