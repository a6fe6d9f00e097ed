"""A stage of progressive distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_distill.losses import EnsembleTargets, Term
from lightning_distill.modules.arguments import ItemWeights, OptimizerFactory, SchedulerFactory, Temperature
from lightning_distill.modules.kd import KD
from lightning_distill.residual import ResidualEnsemble, residual_members
from lightning_distill.stages import Earlier, EarlierStage, current_stages
from lightning_distill.tasks import Task
from lightning_distill.teachers import EnsembleTeacher, complexity_weights, performance_weights
from lightning_distill.weighting import Weighting

Transfer = Literal["direct", "reuse", "ensemble", "residual"]
MemberWeights = Literal["uniform", "performance", "complexity", "learned"]


class ProgressiveStage(KD):
    """A student that learns from the stages before it (Mirzadeh et al. 2020; Son et al. 2021).

    :class:`~lightning_distill.KD` whose teacher comes from the earlier stages of a
    :class:`~lightning_distill.pipeline.Pipeline`:

    * ``"direct"``: the stage before (teacher assistants, https://arxiv.org/abs/1902.03393);
    * ``"reuse"``: the stage before with weight ``reuse_alpha``, and the first teacher with the rest
      (https://arxiv.org/abs/2009.08825);
    * ``"ensemble"``: all earlier stages;
    * ``"residual"``: the first teacher; the student is the sum of all students so far and a new one, which is trained
      alone (:class:`~lightning_distill.residual.ResidualEnsemble`).

    Of ``"reuse"`` and ``"ensemble"`` each member is softened before they are averaged
    (:class:`~lightning_distill.losses.EnsembleTargets`).

    Args:
        student: The network to train; for ``"residual"`` the new summand.
        transfer: See above.
        reuse_alpha: Weight of the stage before, in [0, 1]; of ``"reuse"``.
        member_weights: Of ``"ensemble"``: all equal, in proportion to the validation metric ``metric``, in inverse
            proportion to the parameters, or learned on the validation data, before the training, by
            :func:`~lightning_distill.teachers.learn_weights` (data that choose the best checkpoint as well, so that
            validation metrics flatter a little); or one number per earlier stage.
        metric: Name of the metric for ``"performance"``; more must be better.
        earlier: The stages before. A pipeline sets it; without one, and without ``earlier``, there is no teacher (to
            load a checkpoint, say).
        temperature: As all others, see :class:`~lightning_distill.KD`.
        alpha: …
        terms: …
        weights: …
        task: …
        optimizer: …
        lr_scheduler: …
        lr_interval: …
        batch_transform: …
        item_weights: …

    Raises:
        ValueError: If an argument is outside its range, there is no earlier stage, or one lacks the metric.

    Example:
        >>> teacher = EarlierStage("teacher", nn.Linear(2, 3))
        >>> stage = ProgressiveStage(nn.Linear(2, 3), earlier=Earlier([teacher]))
        >>> stage.teacher.network is teacher.network
        False
    """

    def __init__(
        self,
        student: nn.Module | str,
        transfer: Transfer = "direct",
        *,
        reuse_alpha: float = 0.5,
        member_weights: MemberWeights | Sequence[float] = "uniform",
        metric: str = "val/accuracy",
        earlier: Earlier | None = None,
        temperature: Temperature = 4.0,
        alpha: float = 0.3,
        terms: Mapping[str, Term] | None = None,
        weights: Mapping[str, float] | Weighting | None = None,
        task: Task | None = None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        batch_transform: Callable[[Any], Any] | None = None,
        item_weights: ItemWeights | None = None,
    ) -> None:
        if transfer not in ("direct", "reuse", "ensemble", "residual"):
            raise ValueError(f"`transfer` must be 'direct', 'reuse', 'ensemble' or 'residual', got {transfer!r}.")
        if not 0 <= reuse_alpha <= 1:
            raise ValueError(f"`reuse_alpha` must be in [0, 1], got {reuse_alpha}.")
        if isinstance(member_weights, str) and member_weights not in get_args(MemberWeights):
            raise ValueError(
                "`member_weights` must be 'uniform', 'performance', 'complexity', 'learned' or numbers, got "
                f"{member_weights!r}."
            )
        earlier = current_stages() if earlier is None else earlier
        teacher, own = None, {}
        if earlier is not None:
            first, previous = earlier.first, earlier.previous
            if transfer == "direct":
                teacher = previous.teacher()
            elif transfer == "residual":
                teacher = first.teacher()
                if len(earlier) > 1:
                    student = _added(previous, student, task)
            elif transfer == "reuse" and len(earlier) == 1:
                teacher = first.teacher()
            elif transfer == "reuse":
                teacher = EnsembleTeacher([previous.teacher(), first.teacher()], [reuse_alpha, 1 - reuse_alpha])
            else:
                teacher = EnsembleTeacher(
                    [stage.teacher() for stage in earlier], _member_weights(member_weights, earlier, metric)
                )
            if isinstance(teacher, EnsembleTeacher) and alpha < 1:
                own = {"soft": EnsembleTargets()}
        super().__init__(
            student,
            teacher,
            temperature,
            alpha,
            terms=own | dict(terms or {}),
            weights=weights,
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            item_weights=item_weights,
        )
        self.transfer = transfer
        self._learns = transfer == "ensemble" and member_weights == "learned" and earlier is not None

    def on_fit_start(self) -> None:
        """Learn the members' weights, if that is asked for; a resumed run learns the same."""
        super().on_fit_start()
        if self._learns:
            assert isinstance(self.teacher, EnsembleTeacher)
            datamodule = getattr(self.trainer, "datamodule", None)
            if datamodule is None:
                raise ValueError("`member_weights='learned'` needs a data module with validation data, got none.")
            with torch.random.fork_rng(devices=[]):
                shares = self.teacher.learned_shares(
                    (
                        self.trainer.strategy.batch_to_device(batch, self.device)
                        for batch in datamodule.val_dataloader()
                    ),
                    self.task,
                )
            self.teacher.shares = self.trainer.strategy.broadcast(shares)


def _added(previous: EarlierStage, student: nn.Module | str, task: Task | None) -> nn.Module:
    if isinstance(student, str):
        raise ValueError(
            f"`student` must be a network for `transfer='residual'`, got the name {student!r}. Load it first."
        )
    return ResidualEnsemble([*residual_members(previous.copied()), student])


def _member_weights(chosen: MemberWeights | Sequence[float], earlier: Earlier, metric: str) -> Sequence[float] | None:
    if chosen == "uniform":
        return None
    if chosen == "learned":
        if running := [stage.name for stage in earlier if stage.following is not None]:
            raise ValueError(
                f"`member_weights='learned'` needs finished stages, but {running[0]!r} is still being trained."
            )
        return None  # until the training begins
    if chosen == "complexity":
        return complexity_weights([sum(p.numel() for p in stage.network.parameters()) for stage in earlier])
    if chosen == "performance":
        if missing := [stage.name for stage in earlier if metric not in stage.metrics]:
            raise ValueError(
                f"The stage {missing[0]!r} has no metric {metric!r} to weight it by; it has "
                f"{sorted(next(stage for stage in earlier if stage.name == missing[0]).metrics)}. Pass `metric=`."
            )
        return performance_weights([stage.metrics[metric] for stage in earlier])
    return list(chosen)
