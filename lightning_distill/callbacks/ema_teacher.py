"""Let the moving average of the student teach it."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_distill.callbacks.own_teacher import bring_teacher
from lightning_distill.teachers.ema import (
    Buffers,
    EMATeacher,
    check_momentum,
    momentum_alpha,
    scale_momentum,
    warmed_up_momentum,
)


class MeanTeacher(L.Callback):
    """Teach the student by the exponential moving average of its own weights (Tarvainen and Valpola 2017).

    For a module without a teacher: the callback makes an :class:`~lightning_distill.teachers.EMATeacher` and moves it
    after every optimizer step. (A module that has one already, ``KD(student, EMATeacher(student))``, keeps it.) The
    average then speaks in the loss like any other teacher, also about samples without a label. It sees what the student
    sees, in eval mode: noise that only the student shall see belongs into the student, as dropout does.

    The teacher is training state, and is in the checkpoints; a resumed run continues exactly. The exported student
    knows nothing of it. ``val/fidelity`` and ``val/agreement`` compare the student with it, and ``ema/distance`` is
    logged with the losses.

    With Lightning's ``WeightAveraging`` callbacks, which average for evaluation, list this callback first: they copy
    the module as they find it, and would miss a teacher that comes later.

    Args:
        momentum: How much of the average stays in one optimizer step, in [0, 1); or ``"auto"`` for
            :func:`~lightning_distill.teachers.momentum_alpha`, which looks back over ``1 / averaging`` epochs.
        averaging: See :func:`~lightning_distill.teachers.momentum_alpha`; used by ``"auto"`` alone.
        warm_up: Whether the average is a plain mean until ``momentum`` is reached, so that the initial weights are soon
            forgotten. Otherwise it starts from them.
        every_n_steps: Update after so many optimizer steps, with ``momentum`` to the power of their number.
        buffers: See :class:`~lightning_distill.teachers.EMATeacher`.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training if the module has another teacher,
            or a weight-averaging callback is listed before.
        TypeError: At the start of the training, if the module is no ``DistillationModule``.

    Example:
        >>> callback = MeanTeacher(momentum=0.99)  # L.Trainer(callbacks=[callback]).fit(KD(student, alpha=0.5), ...)
    """

    def __init__(
        self,
        momentum: float | Literal["auto"] = 0.99,
        averaging: float = 4.0,
        warm_up: bool = True,
        every_n_steps: int = 1,
        buffers: Buffers = "ema",
    ) -> None:
        if momentum != "auto":
            check_momentum(momentum)
        if not averaging > 0:
            raise ValueError(f"`averaging` must be positive, got {averaging}.")
        if not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        if buffers not in ("ema", "copy"):
            raise ValueError(f"`buffers` must be 'ema' or 'copy', got {buffers!r}.")
        self.momentum = momentum
        self.averaging = averaging
        self.warm_up = warm_up
        self.every_n_steps = every_n_steps
        self.buffers: Buffers = buffers
        self._alpha = 0.0
        self._last_step = 0
        self._last_log = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the teacher."""
        if stage != "fit":
            return
        bring_teacher(self, trainer, pl_module, lambda student: EMATeacher(student, self.buffers), EMATeacher)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn how many steps an epoch has."""
        self._last_step = self._last_log = trainer.global_step
        if self.momentum == "auto":
            batches = trainer.num_training_batches
            if not 0 < batches < float("inf"):
                raise ValueError(
                    "`momentum='auto'` needs the length of an epoch, which this data loader does not have. Give a "
                    "number."
                )
            steps = -(-int(batches) // trainer.accumulate_grad_batches)
            self._alpha = scale_momentum(momentum_alpha(1, steps, self.averaging), self.every_n_steps)
        else:
            self._alpha = scale_momentum(self.momentum, self.every_n_steps)
        _warn_of_coarse_averages(pl_module.teacher, self._alpha)  # type: ignore[arg-type]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the teacher, if the optimizer has stepped."""
        step = trainer.global_step
        if step == self._last_step or step % self.every_n_steps:
            return
        self._last_step = step
        teacher = pl_module.teacher
        assert isinstance(teacher, EMATeacher)
        alpha = warmed_up_momentum(self._alpha, teacher.updates) if self.warm_up else self._alpha
        teacher.update(pl_module.student, alpha)  # type: ignore[arg-type]
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set, but not declared, by Trainer
        if step - self._last_log >= max(every, 1):
            self._last_log = step
            pl_module.log("ema/distance", teacher.distance(pl_module.student), batch_size=1)  # type: ignore[arg-type]


def _warn_of_coarse_averages(teacher: EMATeacher, alpha: float) -> None:
    """A weight that moves by less than half a unit in its last place does not move at all."""
    dtypes = {parameter.dtype for parameter in teacher.network.parameters() if parameter.is_floating_point()}
    for dtype in dtypes:
        if 1 - alpha < torch.finfo(dtype).eps:
            rank_zero_warn(
                f"The average is kept in {dtype}, in which a step of {1 - alpha:.1g} of the way to the student is "
                "mostly rounded away: the teacher will hardly follow. Train with `precision='bf16-mixed'`, which keeps "
                "weights in float32, or lower `momentum`."
            )
