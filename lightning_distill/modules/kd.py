"""Distillation from a teacher's logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from lightning_distill.losses.hard_and_soft import hard_and_soft
from lightning_distill.losses.soft_targets import SoftTargets
from lightning_distill.losses.targets import CrossEntropy
from lightning_distill.losses.term import Term
from lightning_distill.modules.arguments import (
    EVERY_TERM,
    ItemWeights,
    OptimizerFactory,
    SchedulerFactory,
    Temperature,
    build_task,
)
from lightning_distill.modules.base import DistillationModule
from lightning_distill.outputs import Step
from lightning_distill.tasks import Task
from lightning_distill.teachers.build import TeacherLike
from lightning_distill.weighting import FixedWeights, Weighting


class KD(DistillationModule):
    """Train ``student`` on labels and on the softened predictions of ``teacher`` (Hinton, Vinyals and Dean 2015).

    ``loss = alpha * hard + (1 - alpha) * soft``, where ``hard`` is the cross-entropy with the labels and ``soft`` the
    forward KL divergence from the teacher at ``temperature``, times its square. Samples without a label (``-100``) are
    taught by the teacher alone.

    Args:
        student: See :class:`DistillationModule`, as for all arguments not listed here.
        teacher: See :class:`DistillationModule`. ``None`` needs ``alpha=1.0`` to train.
        temperature: Of the soft targets, positive; or a rule.
        alpha: Weight of the labels' loss, in [0, 1]; the teacher's gets ``1 - alpha``. With 1 the teacher, if there
            is one, only serves to measure agreement. Default 0.3.
        terms: Loss terms beside, or instead of, ``"hard"`` and ``"soft"``: ``{"soft": DKD()}`` replaces the
            divergence. For language models, both are one fused term ``"kd"`` unless they are named here, in ``weights``
            or in ``item_weights``.
        weights: Weights of ``terms``, 1 by default. ``"hard"`` and ``"soft"`` have theirs from ``alpha``. Or a
            :class:`~lightning_distill.weighting.Weighting` of all terms; then ``alpha`` has no effect below 1.
        task: See :class:`DistillationModule`.
        optimizer: See :class:`DistillationModule`.
        lr_scheduler: See :class:`DistillationModule`.
        lr_interval: See :class:`DistillationModule`.
        batch_transform: See :class:`DistillationModule`.
        item_weights: See :class:`DistillationModule`.

    Raises:
        ValueError: If ``alpha`` is outside [0, 1], or as :class:`DistillationModule`.

    Example:
        >>> module = KD(nn.Linear(4, 3), nn.Linear(4, 3), temperature=4.0, alpha=0.5)
        >>> module.weighting.weights()
        {'hard': 0.5, 'soft': 0.5}
    """

    def __init__(
        self,
        student: nn.Module | str,
        teacher: TeacherLike = None,
        temperature: Temperature = 4.0,
        alpha: float = 0.3,
        *,
        terms: Mapping[str, Term] | None = None,
        weights: Mapping[str, float] | Weighting | None = None,
        task: Task | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Any], Any] | None = None,
        item_weights: ItemWeights | None = None,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha`, the weight of the labels' loss, must be in [0, 1], got {alpha}.")
        task = build_task(task)
        more = dict(terms or {})
        named = {*more, *(item_weights or {}), *(weights if isinstance(weights, Mapping) else ())}
        touched = isinstance(weights, Weighting) or bool(named & {"hard", "soft", EVERY_TERM})
        joint = None if touched or alpha == 1 else task.joint_term(float(alpha))
        own: dict[str, Term]
        if joint is not None:
            own, own_weights = {"kd": joint}, {"kd": 1.0}
        elif alpha == 1:
            own, own_weights = {"hard": task.hard_term()}, {"hard": 1.0}
        else:
            own = {"hard": task.hard_term(), "soft": task.soft_term()}
            own_weights = {"hard": float(alpha), "soft": 1.0 - alpha}
        all_weights = (
            weights if isinstance(weights, Weighting) else dict.fromkeys(more, 1.0) | own_weights | dict(weights or {})
        )
        super().__init__(
            student,
            teacher,
            terms=own | more,
            weights=all_weights,
            temperature=temperature,
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            item_weights=item_weights,
        )

    def loss(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar that is minimised; the loss of each term, for the log (their graphs are in ``live``).

        ``hard`` and ``soft`` are computed together where all items count alike and the weights are constants: the same
        numbers in less time.
        """
        weighting, labels, temperature = self.weighting, step.labels, step.temperature
        if (
            (pair := _plain_pair(self.terms)) is None
            or type(weighting) is not FixedWeights
            or self.item_weights
            or step.teacher is None
            or step.mask is not None
            or labels is None
            or isinstance(temperature, Tensor)
        ):
            return super().loss(step)
        total, hard, soft = hard_and_soft(
            step.student.logits,
            step.teacher.logits,
            labels,
            temperature=temperature,
            hard_weight=weighting.values["hard"],
            soft_weight=weighting.values["soft"],
            label_smoothing=pair[0].label_smoothing,
            scale_by_t2=pair[1].scale_by_t2,
        )
        return total, {"hard": hard, "soft": soft}


def _plain_pair(terms: nn.ModuleDict) -> tuple[CrossEntropy, SoftTargets] | None:
    """The terms of the default loss, where there are no others; a subclass may compute something else."""
    if len(terms) != 2 or "hard" not in terms or "soft" not in terms:
        return None
    hard, soft = terms["hard"], terms["soft"]
    if type(hard) is CrossEntropy and type(soft) is SoftTargets and soft.beta == soft.skew == 0:
        return hard, soft
    return None
