"""Distillation from several earlier selves at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import (
    Direction,
    check_same_shape,
    relative_entropy,
    softened_log_softmax,
)
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Outputs, Step


class PastOutputs(Outputs):
    """What several earlier selves said: their mean as ``logits``, and each of them.

    Args:
        logits: Their mean, see :class:`Outputs`.
        members: Logits of each, shape ``(k, items..., C)``.
        weights: Weight of each, shape ``(k,)``, sum 1.
        **more: As for :class:`Outputs`.
    """

    def __init__(self, logits: Tensor, *, members: Tensor, weights: Tensor, **more: Any) -> None:
        super().__init__(logits, **more)
        self.members = members
        self.weights = weights


def temporal_kd(
    student_logits: Tensor,
    past_logits: Tensor,
    weights: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    direction: Direction = "forward",
    scale_by_t2: bool = True,
) -> Tensor:
    r"""Weighted sum of the divergences from several teachers of each item, in nats, times ``T ** 2``.

    .. math::
        \sum_t w_t \mathrm{KL}(p_t \,\|\, q) = \mathrm{KL}(\bar p \,\|\, q) + \mathrm{const}, \qquad
        \sum_t w_t \mathrm{KL}(q \,\|\, p_t) = \mathrm{KL}(q \,\|\, \tilde p) - \log Z

    with the arithmetic mean :math:`\bar p` (forward) and the normalised geometric mean :math:`\tilde p` (reverse): the
    gradient is that of distilling one averaged teacher. Yang et al. (2019), Snapshot Distillation,
    https://arxiv.org/abs/1812.00123, has one earlier self; with several this is plain multi-teacher distillation.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        past_logits: Unnormalised scores of the ``k`` teachers, shape ``(k, items..., C)``; detached here.
        weights: Shape ``(k,)``, not negative, sum 1.
        temperature: As in :func:`~lightning_distill.losses.kl_divergence`.
        direction: As in :func:`~lightning_distill.losses.kl_divergence`.
        scale_by_t2: As in :func:`~lightning_distill.losses.kl_divergence`.

    Returns:
        Shape ``(items...)``, in float32 or wider.

    Raises:
        ValueError: If shapes do not fit, or ``direction`` is unknown.

    Example:
        >>> past = torch.tensor([[[0.0, 2.0]], [[2.0, 0.0]]])
        >>> temporal_kd(torch.zeros(1, 2), past, torch.tensor([0.5, 0.5]))
        tensor([0.3278])
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
    if past_logits.ndim < 1 or weights.shape != past_logits.shape[:1]:
        raise ValueError(
            f"`weights` must have one entry for each of the teachers, got shape {tuple(weights.shape)} for "
            f"`past_logits` of shape {tuple(past_logits.shape)}."
        )
    check_same_shape(student_logits, past_logits[0])
    log_q = softened_log_softmax(student_logits, temperature)
    divergence = torch.zeros((), dtype=log_q.dtype, device=log_q.device)
    for weight, logits in zip(weights.to(log_q.dtype), past_logits.detach(), strict=True):
        log_p = softened_log_softmax(logits, temperature)
        divergence = divergence + weight * (
            relative_entropy(log_p, log_q) if direction == "forward" else relative_entropy(log_q, log_p)
        )
    return divergence * temperature**2 if scale_by_t2 else divergence


class TemporalTargets(Term):
    """Weighted sum of the divergences from several earlier selves, at the temperature of the step.

    For :class:`~lightning_distill.teachers.PastTeacher`. With any other teacher, or with one earlier self, it is
    :class:`~lightning_distill.losses.SoftTargets`. That term, used with several, softens their mean at temperature 1
    instead of averaging what was softened: the same at temperature 1 but for a constant.

    Args:
        direction: ``"forward"`` (the mean teacher of the arithmetic mean) or ``"reverse"`` (of the geometric mean).
        scale_by_t2: Whether to multiply by the square of the temperature.

    Raises:
        ValueError: If ``direction`` is unknown.
    """

    def __init__(self, direction: Direction = "forward", scale_by_t2: bool = True) -> None:
        super().__init__()
        if direction not in ("forward", "reverse"):
            raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
        self.direction: Direction = direction
        self.scale_by_t2 = scale_by_t2

    def forward(self, step: Step) -> Tensor:
        """Divergence of each item, nats."""
        teacher = teacher_outputs(step)
        if isinstance(teacher, PastOutputs):
            members, weights = teacher.members, teacher.weights
        else:
            members = teacher.logits.unsqueeze(0)
            weights = members.new_ones(1, dtype=torch.float32)
        return temporal_kd(
            step.student.logits,
            members,
            weights,
            temperature=step.temperature,
            direction=self.direction,
            scale_by_t2=self.scale_by_t2,
        )
