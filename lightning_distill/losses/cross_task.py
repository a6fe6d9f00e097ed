"""Divergence from a teacher of another task, whose classes are mapped to the student's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import softened_log_softmax
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step


def cross_task_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    mapping: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    r"""KL divergence from the teacher's prediction, carried over to the student's classes, in nats, times ``T ** 2``.

    .. math:: T^2 \, \mathrm{KL}(p M \,\|\, q), \qquad p = \sigma(z^t / T), \; q = \sigma(z^s / T)

    with teacher ``p``, student ``q`` and a label mapping ``M``: ``M[a, b]`` is the probability that what the teacher
    calls ``a`` is a ``b`` for the student. Knowledge of one task helps another in this way where their labels are
    related (Clark et al. 2019, BAM!, https://arxiv.org/abs/1907.04829, distils several tasks into one network). With
    the unit matrix it is :func:`~lightning_distill.losses.kl_divergence`.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Unnormalised scores, shape ``(items..., A)``; detached here.
        mapping: Shape ``(A, C)``, none negative, rows that sum to 1.
        temperature: ``T > 0``; a number, or one value per item.
        scale_by_t2: Whether to multiply by ``T ** 2``.

    Returns:
        Shape ``(items...)``, in float32 or wider; at least 0 up to rounding.

    Raises:
        ValueError: If the shapes do not fit, or ``temperature`` is not positive and finite.

    Example:
        >>> mapping = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # cat, dog -> animal; car -> thing
        >>> cross_task_kd(torch.zeros(1, 2), torch.tensor([[2.0, 2.0, 0.0]]), mapping)
        tensor([0.4570])
    """
    expected = (teacher_logits.shape[-1], student_logits.shape[-1])
    if mapping.shape != expected:
        raise ValueError(
            f"`mapping` must have one row per class of the teacher and one column per class of the student, "
            f"shape {expected}, got {tuple(mapping.shape)}."
        )
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"The student's logits have items of shape {tuple(student_logits.shape[:-1])}, the teacher's "
            f"{tuple(teacher_logits.shape[:-1])}; both must see the same batch."
        )
    log_q = softened_log_softmax(student_logits, temperature)
    log_p = softened_log_softmax(teacher_logits.detach(), temperature)
    with torch.autocast(log_q.device.type, enabled=False):  # it would multiply the matrices in half precision
        target = log_p.exp().to(log_q.dtype) @ mapping.to(log_q.dtype)
    divergence = (torch.xlogy(target, target) - target * log_q).sum(dim=-1)
    return divergence * temperature**2 if scale_by_t2 else divergence


class CrossTaskTargets(Term):
    """Divergence from a teacher of another task, at the temperature of the step; see :func:`cross_task_kd`.

    Args:
        mapping: Shape ``(A, C)``: row ``a`` says how likely each class of the student is where the teacher says ``a``.

    Raises:
        ValueError: If ``mapping`` is no matrix, or a row is no probability distribution.

    Example:
        >>> term = CrossTaskTargets([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> term.mapping.shape
        torch.Size([3, 2])
    """

    mapping: Tensor

    def __init__(self, mapping: Tensor | Sequence[Sequence[float]]) -> None:
        super().__init__()
        matrix = torch.as_tensor(mapping).detach().clone()
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        if matrix.ndim != 2:
            raise ValueError(
                f"`mapping` must be a matrix, teacher's classes by student's, got {matrix.ndim} dimensions."
            )
        bad = ~((matrix >= 0).all(dim=1) & ((matrix.sum(dim=1) - 1).abs() < 1e-4))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                "Each row of `mapping` must be a probability distribution over the student's classes; row "
                f"{row} is {matrix[row].tolist()}, which sums to {matrix[row].sum().item():g}."
            )
        self.register_buffer("mapping", matrix, persistent=False)  # given anew with the term

    def forward(self, step: Step) -> Tensor:
        """Divergence of each item, nats."""
        return cross_task_kd(
            step.student.logits, teacher_outputs(step).logits, self.mapping, temperature=step.temperature
        )
