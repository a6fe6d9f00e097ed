"""Weights that follow a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L

from lightning_distill.callbacks.weighting import fixed_weights
from lightning_distill.weighting.fixed import check_weight

Schedule = Callable[[int], Any]


class ScheduledWeights(L.Callback):
    """Set the weights of some terms as functions of the optimizer step.

    The other terms keep their constant weights. A schedule has no state: it stays put over the micro-batches of
    ``accumulate_grad_batches`` and continues where it was after a resume.

    Args:
        schedules: By term name, functions from the number of optimizer steps done to a weight that is not negative, as
            :class:`~lightning_distill.weighting.StagedWeight`.

    Raises:
        ValueError: If there are none, or a weight is negative; at the start of the training, if a term is unknown or
            something else weighs the terms.
        TypeError: If a schedule cannot be called; at the start of the training, if the module is no
            :class:`~lightning_distill.DistillationModule`.

    Example:
        >>> from lightning_distill.weighting import StagedWeight
        >>> ScheduledWeights({"soft": StagedWeight(warm_up=10, middle=0.8)}).weights_at(10)
        {'soft': 0.8}
    """

    def __init__(self, schedules: Mapping[str, Schedule]) -> None:
        if not schedules:
            raise ValueError("`schedules` must hold a schedule for at least one term, got none.")
        for name, schedule in schedules.items():
            if not callable(schedule):
                raise TypeError(
                    f"`schedules[{name!r}]` must be a function of the step, such as `StagedWeight(warm_up=100)`, got "
                    f"{type(schedule).__name__}."
                )
        self.schedules = dict(schedules)
        self.weights_at(0)  # checks the values

    def weights_at(self, step: int) -> dict[str, float]:
        """Weights of optimizer step ``step``, counted from 0.

        Raises:
            ValueError: If one is negative.
        """
        weights = {name: float(schedule(step)) for name, schedule in self.schedules.items()}
        for name, weight in weights.items():
            check_weight(name, weight)
        return weights

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there are such terms."""
        known = fixed_weights(self, pl_module).values
        if unknown := [name for name in self.schedules if name not in known]:
            raise ValueError(f"`schedules` names {unknown}, which are no terms; there are {list(known)}.")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the weights of this step."""
        fixed_weights(self, pl_module).values.update(self.weights_at(trainer.global_step))
