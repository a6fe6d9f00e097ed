"""Refine the labels by the student's own predictions of the epoch before."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_distill.callbacks.own_teacher import bring_teacher, needing_teacher
from lightning_distill.losses.refinement import RefinedTargets
from lightning_distill.losses.term import Term
from lightning_distill.modules import DistillationModule
from lightning_distill.teachers.previous import PreviousPredictions

STATE = "soft_label_refinement"


class SoftLabelRefinement(L.Callback):
    """Train on labels mixed with what the student said about the same sample one epoch ago (PS-KD, Kim et al. 2021).

    The share of its own prediction grows from epoch to epoch, up to ``alpha`` in the last. For a module that learns
    from labels alone, ``KD(student, alpha=1.0)``: the callback puts
    :class:`~lightning_distill.losses.RefinedTargets` in the place of its term ``"hard"``, and brings the teacher.

    A resumed run continues exactly, in several processes too; the predictions are in the checkpoints
    (``8 * samples * classes`` bytes).

    Args:
        alpha: Share of the earlier prediction in the targets of the last epoch, in [0, 1]; the paper has 0.8.
        samples: Size of the training set: every ``index`` of a batch is below it. Default: what the data module says
            as ``train_size``.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training if the size of the training set
            or the number of epochs is unknown, or the module has a teacher already, or terms that need one.
        TypeError: At the start of the training, if the module is no ``DistillationModule``.

    Example:
        >>> callback = SoftLabelRefinement(0.8)  # L.Trainer(callbacks=[callback]).fit(KD(student, alpha=1.0), ...)
    """

    def __init__(self, alpha: float = 0.8, samples: int | None = None) -> None:
        RefinedTargets(Term(), alpha)  # checks the value
        if samples is not None and not samples >= 1:
            raise ValueError(f"`samples`, the size of the training set, must be at least 1, got {samples}.")
        self.alpha = alpha
        self.samples = samples
        self._epoch = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Bring the teacher and the term."""
        if stage != "fit":
            return
        self._epoch = 0
        samples = self.samples or getattr(getattr(trainer, "datamodule", None), "train_size", None)
        if samples is None:
            raise ValueError(
                "SoftLabelRefinement must know the size of the training set: pass `samples`, or a data module with "
                "`train_size`."
            )
        bring_teacher(self, trainer, pl_module, lambda student: PreviousPredictions(samples), PreviousPredictions)
        assert isinstance(pl_module, DistillationModule)
        if needy := needing_teacher(pl_module):
            raise ValueError(
                f"SoftLabelRefinement refines the labels itself, but the loss terms {needy} need a teacher of their "
                "own. Train on labels alone: `KD(student, alpha=1.0)`."
            )
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError("SoftLabelRefinement counts epochs: give the Trainer `max_epochs`.")
        if "hard" not in pl_module.terms:
            raise ValueError(f"SoftLabelRefinement refines the term 'hard'; the module has {list(pl_module.terms)}.")
        hard = pl_module.terms["hard"]
        if isinstance(hard, RefinedTargets):
            hard.epochs = trainer.max_epochs
        else:
            pl_module.terms["hard"] = RefinedTargets(hard, self.alpha, trainer.max_epochs)  # type: ignore[arg-type]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """In a new epoch, let the predictions so far be those of the epoch before.

        Not at its end: Lightning leaves that out where it resumes from the last step of an epoch.
        """
        teacher = pl_module.teacher
        assert isinstance(teacher, PreviousPredictions)
        if self._epoch < trainer.current_epoch:
            self._epoch = trainer.current_epoch
            teacher.next_epoch()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the predictions of all processes."""
        if not isinstance(pl_module.teacher, PreviousPredictions):
            return
        teacher = pl_module.teacher
        checkpoint[STATE] = {"epoch": self._epoch, "previous": teacher.previous, "present": teacher.merged()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the predictions back."""
        if not isinstance(pl_module.teacher, PreviousPredictions):  # a test, say
            return
        teacher, state = pl_module.teacher, checkpoint[STATE]
        self._epoch = state["epoch"]
        teacher.previous, teacher.present = state["previous"], state["present"]
