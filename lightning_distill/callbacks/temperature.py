"""Schedule the distillation temperature."""

from __future__ import annotations

import math
from typing import Any

import lightning as L

from lightning_distill.temperature import AnnealingShape, annealed_temperature


class TemperatureAnnealing(L.Callback):
    """Lower ``pl_module.temperature`` from ``tau_max`` to ``tau_min`` over ``num_steps``, then hold it.

    The temperature is a function of the optimizer step alone, so it stays put over the micro-batches of
    ``accumulate_grad_batches`` and continues where it was after a resume. The length of the annealing is kept in the
    checkpoint: a run that is resumed with more epochs goes on with the schedule it began.

    Args:
        tau_max: Temperature of the first optimizer step.
        tau_min: Temperature at the end; positive, at most ``tau_max``.
        num_steps: Length in optimizer steps (not batches, not epochs). Default: the whole training.
        shape: ``"exponential"``, ``"linear"`` or ``"cosine"``; see
            :func:`~lightning_distill.temperature.annealed_temperature`.
        gamma: Rate of the exponential; by default such that it ends at ``tau_min``.

    Raises:
        ValueError: If an argument is outside its range; at the start of a training of unknown length without
            ``num_steps``.
        TypeError: At the start of the training, if the module has no constant ``temperature`` to turn.

    Example:
        >>> TemperatureAnnealing(tau_max=8.0, tau_min=2.0, num_steps=100, shape="linear").temperature_at(50)
        5.0
    """

    def __init__(
        self,
        tau_max: float,
        tau_min: float = 1.0,
        num_steps: int | None = None,
        shape: AnnealingShape = "exponential",
        gamma: float | None = None,
    ) -> None:
        if num_steps is not None and not num_steps > 0:
            raise ValueError(f"`num_steps` must be positive, got {num_steps}.")
        annealed_temperature(0.0, tau_max, tau_min, shape=shape, gamma=gamma)  # checks the values
        self.tau_max = tau_max
        self.tau_min = tau_min
        self.num_steps = num_steps
        self.shape: AnnealingShape = shape
        self.gamma = gamma

    def temperature_at(self, step: int) -> float:
        """Temperature of optimizer step ``step``, counted from 0.

        Raises:
            ValueError: If ``num_steps`` is not known yet.
        """
        if self.num_steps is None:
            raise ValueError("`num_steps` is not known before the training starts; pass it to look at the schedule.")
        return annealed_temperature(
            step / self.num_steps, self.tau_max, self.tau_min, shape=self.shape, gamma=self.gamma
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is a temperature, and that nobody else sets it."""
        temperature = getattr(pl_module, "temperature", None)
        if not isinstance(temperature, float):
            found = "does not have" if temperature is None else f"computes by {temperature!r}"
            raise TypeError(
                f"{type(self).__name__} sets `temperature`, which {type(pl_module).__name__} {found}. Use a module "
                "with a constant temperature, such as KD(..., temperature=4.0), or remove the callback."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the length of the training."""
        if self.num_steps is None:
            total = trainer.estimated_stepping_batches
            if not 0 < total < math.inf:
                raise ValueError(
                    "`num_steps` of TemperatureAnnealing must be given: the length of this training is unknown "
                    "(no `max_steps`, `max_epochs`, or a data loader without a length)."
                )
            self.num_steps = int(total)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the temperature of this step."""
        pl_module.temperature = self.temperature_at(trainer.global_step)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """The length of the annealing."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the length of the annealing that was begun, unless another was asked for."""
        self.num_steps = self.num_steps or state_dict["num_steps"]
