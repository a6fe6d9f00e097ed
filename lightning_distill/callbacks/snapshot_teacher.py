"""Let snapshots of the running training teach its student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import nn

from lightning_distill.callbacks.own_teacher import bring_teacher, needing_teacher
from lightning_distill.modules import DistillationModule
from lightning_distill.teachers.past import PastTeacher, check_weights


class SnapshotTeacher(L.Callback):
    """Teach the student by the last ``size`` snapshots of itself, taken at the ends of epochs.

    For a module without a teacher: the callback makes a :class:`~lightning_distill.teachers.PastTeacher`. Until the
    first snapshot the terms that compare with a teacher contribute nothing. Yang et al. (2019),
    https://arxiv.org/abs/1812.00123, take one snapshot at the end of each cycle of a cyclic learning rate:
    ``every_n_epochs`` is then the length of a cycle.

    Snapshots are training state, and are in the checkpoints; a resumed run continues exactly. The exported student
    knows nothing of them. List the callback before Lightning's ``WeightAveraging`` ones.

    Args:
        size: How many snapshots teach, at least 1.
        every_n_epochs: How often one is taken, at least 1.
        weights: Weight of each, newest first, the first positive. Default: equal weights.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training if the module has another
            teacher, or nothing to learn from before the first snapshot.
        TypeError: At the start of the training, if the module is no ``DistillationModule``.

    Example:
        >>> callback = SnapshotTeacher(size=3)  # L.Trainer(callbacks=[callback]).fit(KD(student, alpha=0.5), ...)
    """

    def __init__(self, size: int = 1, every_n_epochs: int = 1, weights: Sequence[float] | None = None) -> None:
        if not size >= 1:
            raise ValueError(f"`size`, the number of snapshots, must be at least 1, got {size}.")
        if not every_n_epochs >= 1:
            raise ValueError(f"`every_n_epochs` must be at least 1, got {every_n_epochs}.")
        check_weights(weights, size)
        self.size = size
        self.every_n_epochs = every_n_epochs
        self.weights = weights

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the teacher."""
        if stage != "fit":
            return
        bring_teacher(
            self, trainer, pl_module, lambda student: PastTeacher(student, self.size, self.weights), PastTeacher
        )
        assert isinstance(pl_module, DistillationModule)
        weights = pl_module.weighting.weights()
        needy = needing_teacher(pl_module)
        if not any(float(weights.get(name, 1.0)) > 0 for name in pl_module.terms if name not in needy):
            raise ValueError(
                "Before the first snapshot there is nobody to learn from, and all loss terms with a weight need a "
                f"teacher: {needy}. Keep a term on labels (`alpha` above 0)."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot of what the epochs before have left, if it is time.

        Not at their end: Lightning leaves that out where it resumes from the last step of an epoch.
        """
        teacher, student = pl_module.teacher, pl_module.student
        assert isinstance(teacher, PastTeacher)
        assert isinstance(student, nn.Module)
        if teacher.remembered < trainer.current_epoch // self.every_n_epochs:
            teacher.remember(student)
