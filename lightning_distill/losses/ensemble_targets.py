"""Learning from several teachers at once, each softened by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import kl_divergence
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step

MEMBER_LOGITS = "members.logits"
MEMBER_WEIGHTS = "members.weights"


def mean_kl_divergence(
    student_logits: Tensor,
    member_logits: Tensor,
    weights: Tensor | Sequence[float],
    *,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    r"""Mean of the divergences from several teachers, nats, times ``T ** 2``.

    .. math:: L = T^2 \sum_m w_m \, \mathrm{KL}(p_{m,T} \,\|\, q_T)

    It is the divergence from the mixture of the softened predictions, :math:`\sum_m w_m p_{m,T}`, plus a number that
    does not depend on the student: the gradient is that of learning from the mixture. With the student of the stage
    before and the first teacher it is the reuse of knowledge in densely guided distillation (Son et al. 2021).

    Args:
        student_logits: Shape ``(items..., C)``; the only input that gets a gradient.
        member_logits: Shape ``(members, items..., C)``.
        weights: One per member, sum 1.
        temperature: ``T > 0``; a number, or one value per item.
        scale_by_t2: Whether to multiply by ``T ** 2``.

    Returns:
        Shape ``(items...)``.

    Example:
        >>> same = torch.tensor([[0.5, 0.5]]).log()
        >>> mean_kl_divergence(same, torch.stack([same, same]), [0.6, 0.4])
        tensor([0.])
    """
    shares = weights if isinstance(weights, Tensor) else torch.tensor(list(weights), dtype=torch.float64)
    each = torch.stack(
        [kl_divergence(student_logits, z, temperature=temperature, scale_by_t2=scale_by_t2) for z in member_logits]
    )
    mean: Tensor = torch.tensordot(shares.to(each), each, dims=1)
    return mean


class EnsembleTargets(Term):
    """Mean of the divergences from the members of an :class:`~lightning_distill.teachers.EnsembleTeacher`.

    ``KD(student, EnsembleTeacher([...]), terms={"soft": EnsembleTargets()})``. Unlike :class:`SoftTargets`, which
    softens the members' average, it softens each member before they are averaged (Hinton et al. 2015, section 3).
    """

    def forward(self, step: Step) -> Tensor:
        """Divergence of each item, nats.

        Raises:
            ValueError: If the teacher is no ensemble.
        """
        said = teacher_outputs(step).features
        if MEMBER_LOGITS not in said:
            raise ValueError(
                "`EnsembleTargets` reads what each member of an ensemble says, but the teacher is a single one. Use "
                "`SoftTargets`, or `teacher=EnsembleTeacher([...])`."
            )
        return mean_kl_divergence(
            step.student.logits, said[MEMBER_LOGITS], said[MEMBER_WEIGHTS], temperature=step.temperature
        )
