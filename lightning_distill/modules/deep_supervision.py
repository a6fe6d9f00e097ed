"""A network with classifiers on its inner layers, which learn from the labels and from deeper ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_distill.compression.early_exit import EarlyExitNetwork
from lightning_distill.export import standalone
from lightning_distill.losses.auxiliary_heads import AuxiliaryHeads
from lightning_distill.losses.deep_supervision import LayerwiseKD, OnHeads
from lightning_distill.losses.self_features import FeatureAlignment
from lightning_distill.losses.term import Term
from lightning_distill.modules.arguments import ItemWeights, OptimizerFactory, SchedulerFactory, Temperature, build_task
from lightning_distill.modules.base import DistillationModule
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import Task
from lightning_distill.teachers import TeacherLike
from lightning_distill.weighting import Weighting


class DeepSupervision(DistillationModule):
    """Train ``student`` together with auxiliary heads on its inner layers (Lee et al. 2015; Zhang et al. 2019).

    ``loss = hard + sum(w_i * (alpha * hard_i + (1 - alpha) * KL(deeper || head_i)))``: each head learns from the labels
    and from what the network itself, or the next head, says, which is detached. With a ``teacher`` the network's own
    loss is that of :class:`~lightning_distill.KD`, and ``learn_from="teacher"`` lets it teach the heads too.

    The heads are parameters of the loss terms: trained and in checkpoints, and left behind by ``export``. Validation
    logs the metrics of each head as ``val/<tap>/…``.

    Args:
        student: See :class:`~lightning_distill.DistillationModule`, as for all arguments not listed here.
        heads: The heads, or the names of the layers that get one; see
            :class:`~lightning_distill.losses.AuxiliaryHeads`, which also has their weights and schedule.
        teacher: What teaches the network beside the labels, and, on request, the heads.
        temperature: Of all divergences, positive; or a rule.
        alpha: Weight of the labels in the heads' loss, in [0, 1]; with a ``teacher`` also in the network's. 1 is deep
            supervision without self-distillation.
        learn_from: Who teaches a head beside the labels: the ``"deepest"`` classifier, which is the network itself, the
            ``"next"`` one, or the ``"teacher"``.
        alignment: Weight of the squared distance between the tapped layers and the last of them
            (:class:`~lightning_distill.losses.FeatureAlignment`), not negative; 0 leaves it out.
        terms: Loss terms beside, or instead of, ``"hard"``, ``"soft"``, ``"heads"``, ``"layers"`` and ``"alignment"``.
        weights: Weights of ``terms``, 1 by default; those of our own follow from ``alpha`` and ``alignment``, unless
            they are named here. Or a :class:`~lightning_distill.weighting.Weighting` of all terms.
        task: See :class:`~lightning_distill.DistillationModule`.
        optimizer: See :class:`~lightning_distill.DistillationModule`.
        lr_scheduler: See :class:`~lightning_distill.DistillationModule`.
        lr_interval: See :class:`~lightning_distill.DistillationModule`.
        batch_transform: See :class:`~lightning_distill.DistillationModule`.
        item_weights: See :class:`~lightning_distill.DistillationModule`.

    Raises:
        ValueError: If a value is outside its range, or ``learn_from="teacher"`` without one; at the first batch, if a
            tapped layer is nothing that a head can read, or the taps are out of order.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> DeepSupervision(network, ["1"], alpha=0.75).weighting.weights()
        {'hard': 1.0, 'heads': 0.75, 'layers': 0.25}
    """

    def __init__(
        self,
        student: nn.Module | str,
        heads: AuxiliaryHeads | Sequence[str],
        teacher: TeacherLike = None,
        temperature: Temperature = 3.0,
        alpha: float = 0.7,
        *,
        learn_from: Literal["deepest", "next", "teacher"] = "deepest",
        alignment: float = 0.0,
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
        if not alignment >= 0:
            raise ValueError(f"`alignment` must not be negative, got {alignment}.")
        if learn_from not in ("deepest", "next", "teacher"):
            raise ValueError(f"`learn_from` must be 'deepest', 'next' or 'teacher', got {learn_from!r}.")
        if learn_from == "teacher" and teacher is None:
            raise ValueError("`learn_from` is 'teacher', but there is none. Pass `teacher=...`, or use 'deepest'.")
        task = build_task(task)
        made = heads if isinstance(heads, AuxiliaryHeads) else AuxiliaryHeads(heads)  # `heads` is a hyperparameter
        own: dict[str, tuple[Term, float]] = {"hard": (task.hard_term(), 1.0 if teacher is None else float(alpha))}
        if teacher is not None and alpha < 1:
            own["soft"] = task.soft_term(), 1.0 - alpha
        own["heads"] = OnHeads(task.hard_term(), made), float(alpha)
        if alpha < 1 and learn_from == "teacher":
            own["layers"] = OnHeads(task.soft_term(), made), 1.0 - alpha
        elif alpha < 1:
            own["layers"] = LayerwiseKD(made, learn_from, task.soft_term()), 1.0 - alpha  # type: ignore[arg-type]
        if alignment > 0:
            own["alignment"] = FeatureAlignment(made.taps, channel_dim=made.channel_dim), float(alignment)
        all_terms = {name: term for name, (term, _) in own.items()} | dict(terms or {})
        all_weights = dict.fromkeys(all_terms, 1.0) | {name: weight for name, (_, weight) in own.items()}
        super().__init__(
            student,
            teacher,
            terms=all_terms,
            weights=weights if isinstance(weights, Weighting) else all_weights | dict(weights or {}),
            temperature=temperature,
            task=task,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_interval=lr_interval,
            batch_transform=batch_transform,
            item_weights=item_weights,
        )
        object.__setattr__(self, "heads", made)  # registered by the terms

    heads: AuxiliaryHeads
    """The auxiliary heads; ``heads.weights`` is a knob."""

    def other_outputs(self, step: Step) -> Mapping[str, Outputs]:
        """What each head says."""
        return {tap: Outputs(logits) for tap, logits in zip(self.heads.taps, self.heads.logits(step), strict=True)}

    def export_with_exits(self, path: str | Path | None = None, *, overwrite: bool = False) -> EarlyExitNetwork:
        """The student with its heads, as a network that may be left early; ``export`` gives it without.

        Until it is calibrated (:func:`~lightning_distill.compression.calibrate_exits`) nobody leaves before the end.

        Args:
            path: A folder to write it to (:meth:`~lightning_distill.compression.EarlyExitNetwork.save`). ``None``
                writes nothing.
            overwrite: Whether a folder at ``path`` may be replaced.

        Raises:
            FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
            ValueError: If the heads were never built.
        """
        heads = standalone(self.heads)
        assert isinstance(heads, AuxiliaryHeads)
        network = EarlyExitNetwork(self.export(), heads)
        if path is not None:
            network.save(path, overwrite=overwrite)
        return network
