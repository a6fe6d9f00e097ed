"""The losses on labels and on a teacher's predictions together, in no more operations than by hand."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.soft_targets import check_same_shape, softened_log_softmax, wide
from lightning_distill.outputs import UNLABELLED


def hard_and_soft(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    hard_weight: float,
    soft_weight: float,
    label_smoothing: float = 0.0,
    scale_by_t2: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hard_weight * hard + soft_weight * soft``, ``hard`` and ``soft``.

    The two are the means over all items of :func:`cross_entropy` and of the forward :func:`kl_divergence`. On a small
    batch a loss costs what it costs to launch its operations. Here the items are summed inside the kernels, and mean
    and weight are one factor; there are no values per item that could be masked or weighted.

    Args:
        logits: Shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Same shape; detached here.
        labels: Class indices of shape ``(items...)``, -100 where there is none, or class probabilities of shape
            ``(items..., C)``.
        temperature: ``T > 0``.
        hard_weight: Weight of the cross-entropy.
        soft_weight: Weight of the divergence.
        label_smoothing: As in :func:`cross_entropy`.
        scale_by_t2: As in :func:`kl_divergence`.

    Returns:
        Three scalars in float32 or wider; the first has a graph, the parts are for the log.

    Raises:
        ValueError: If the logits' shapes differ, or ``temperature`` is not positive and finite.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> hard_and_soft(student, teacher, torch.tensor([0]), temperature=1.0, hard_weight=0.5, soft_weight=0.5)
        (tensor(0.8251), tensor(0.1269), tensor(1.5232))
    """
    check_same_shape(logits, teacher_logits)
    logits = wide(logits)
    log_q = softened_log_softmax(logits, temperature)
    log_p = softened_log_softmax(teacher_logits.detach(), temperature)
    soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    items = logits.shape[:-1]
    if len(items) > 1:
        logits, labels = logits.flatten(0, -2), labels.flatten(0, len(items) - 1)
    hard = F.cross_entropy(logits, labels, reduction="sum", ignore_index=UNLABELLED, label_smoothing=label_smoothing)
    share = 1 / max(math.prod(items), 1)
    soft_share = share * temperature**2 if scale_by_t2 else share
    total = (hard * (hard_weight * share)).add(soft, alpha=soft_weight * soft_share)
    return total, hard.detach() * share, soft.detach() * soft_share
