"""Let the moving average of the student's adapter teach it."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_distill.modules import DistillationModule
from lightning_distill.teachers.adapter_ema import AdapterEMATeacher, check_momentum


class AdapterMeanTeacher(L.Callback):
    """Teach a student under a PEFT adapter by the moving average of its adapter; the base is shared.

    For a module without a teacher, ``KD(student, alpha=0.5)``, or with an
    :class:`~lightning_distill.teachers.AdapterEMATeacher`. After every optimizer step the average moves by
    ``1 - momentum`` towards the student; until ``momentum`` is reached it is a plain mean of the weights so far
    (Tarvainen and Valpola 2017), so that it soon forgets the initial ones. A resumed run continues exactly.

    Args:
        momentum: How much of the average stays in one optimizer step, in [0, 1).

    Raises:
        ValueError: If ``momentum`` is outside its range; at the start of the training, if the module has another
            teacher.
        TypeError: At the start of the training, if the module is none of ours or its student has no adapter.

    Example:
        >>> callback = AdapterMeanTeacher(momentum=0.99)  # L.Trainer(callbacks=[callback])
    """

    def __init__(self, momentum: float = 0.99) -> None:
        check_momentum(momentum)
        self.momentum = momentum
        self._last_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the teacher, before a checkpoint is loaded into it."""
        if stage != "fit":
            return
        if not isinstance(pl_module, DistillationModule):
            raise TypeError(
                f"AdapterMeanTeacher needs a module of lightning-distill, such as KD(student, alpha=0.5), got "
                f"{type(pl_module).__name__}."
            )
        if pl_module.teacher is None:
            teacher = AdapterEMATeacher(pl_module.student)
            teacher.tap(dict.fromkeys(name for term in pl_module.terms.values() for name in _teacher_taps(term)))
            pl_module.teacher = teacher
        elif not isinstance(pl_module.teacher, AdapterEMATeacher):
            raise ValueError(
                f"The module has a teacher already, a {type(pl_module.teacher).__name__}; AdapterMeanTeacher brings "
                "its own. Pass `teacher=None`, or remove the callback."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue after the steps that were done."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the teacher, if the optimizer has stepped."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        teacher = pl_module.teacher
        assert isinstance(teacher, AdapterEMATeacher)
        teacher.update(min(1 - 1 / (teacher.updates + 1), self.momentum))


def _teacher_taps(term: Any) -> Any:
    return getattr(term, "teacher_taps", ())
