"""Temperature from how much the gradients of labels and teacher vary."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distill.callbacks.term_gradients import gradient_rows, require_terms, student_layer
from lightning_distill.temperature import gradient_variance_temperature


class GradientVarianceTemperature(L.Callback):
    r"""Set ``pl_module.temperature`` to :math:`\tau_0 \sqrt{\mathrm{Var}\,g_{hard} / \mathrm{Var}\,g_{soft}}`.

    The variance is over micro-batches: those of ``accumulate_grad_batches`` and of all processes, and, where these are
    fewer than ``micro_batches``, those of the next optimizer steps. Estimates are clamped, and averaged geometrically
    over time. See :func:`~lightning_distill.temperature.gradient_variance_temperature` for what the rule can do:
    little, as the soft loss has its factor :math:`\tau^2`, and harm without it.

    Each micro-batch costs a backward pass from both terms to ``layer``, hence the default. The temperature is the same
    in all processes and in the checkpoint, with the gradients of a measurement that is not finished.

    Args:
        tau0: Temperature for equal variances, positive.
        tau_min: Lowest temperature, positive.
        tau_max: Highest temperature.
        momentum: Share of the old temperature after an estimate, in [0, 1).
        micro_batches: Gradients that one estimate is made of, at least 2.
        layer: Submodule of the student whose parameters' gradients are looked at; by default the last one.
        hard: Name of the term on labels.
        soft: Name of the term on the teacher's predictions, with the factor :math:`\tau^2`.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training if the module has no such terms or
            layer, or the soft term lacks its factor.
        TypeError: At the start of the training, if the module has no constant ``temperature`` to turn.
    """

    def __init__(
        self,
        tau0: float = 4.0,
        *,
        tau_min: float = 1.0,
        tau_max: float = 20.0,
        momentum: float = 0.9,
        micro_batches: int = 8,
        layer: str | None = None,
        hard: str = "hard",
        soft: str = "soft",
    ) -> None:
        gradient_variance_temperature(torch.zeros(2, 1), torch.zeros(2, 1), tau0=tau0, tau_min=tau_min, tau_max=tau_max)
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        if not micro_batches >= 2:
            raise ValueError(f"`micro_batches` must be at least 2, a variance needs them, got {micro_batches}.")
        self.tau0 = tau0
        self.tau_min = tau_min
        self.tau_max = tau_max
        self.momentum = momentum
        self.micro_batches = micro_batches
        self.layer = layer
        self.hard = hard
        self.soft = soft
        self.temperature: float | None = None
        self._parameters: list[nn.Parameter] = []
        self._of_step: list[Tensor] = []  # (2, P) per micro-batch of this process
        self._collected: Tensor | None = None  # (M, 2, P), of all processes

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the terms, find the layer, and take the temperature up again."""
        require_terms(self, pl_module, (self.hard, self.soft))
        if not getattr(pl_module.terms[self.soft], "scale_by_t2", True):  # type: ignore[index]
            raise ValueError(
                f"The term {self.soft!r} has `scale_by_t2=False`: without the factor its gradients shrink as the "
                "temperature rises, which raises it further without end. Use `scale_by_t2=True`."
            )
        if not isinstance(pl_module.temperature, float):
            raise TypeError(
                f"GradientVarianceTemperature sets `temperature`, which {type(pl_module).__name__} computes by "
                f"{pl_module.temperature!r}. Give it a number."
            )
        self._parameters = student_layer(pl_module, self.layer)
        if self.temperature is not None:
            pl_module.temperature = self.temperature  # type: ignore[assignment]

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at the two gradients of this micro-batch."""
        self._of_step.append(gradient_rows(pl_module, (self.hard, self.soft), self._parameters))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Gather the gradients of this step; with enough of them, set the temperature of the steps to come."""
        rows, self._of_step = torch.stack(self._of_step), []
        if trainer.world_size > 1:
            rows = trainer.strategy.all_gather(rows).flatten(0, 1)
        if not bool(rows.isfinite().all()):
            return  # an overflow of float16, at which the optimizer's step is skipped too
        if self._collected is not None:
            rows = torch.cat([self._collected.to(rows), rows])
        self._collected = rows
        if len(rows) < self.micro_batches:
            return
        self._collected = None
        estimate = gradient_variance_temperature(
            rows[:, 0], rows[:, 1], tau0=self.tau0, tau_min=self.tau_min, tau_max=self.tau_max
        )
        old = pl_module.temperature if self.temperature is None else self.temperature
        assert isinstance(old, float)
        mixed = self.momentum * math.log(old) + (1 - self.momentum) * math.log(estimate)
        self.temperature = min(max(math.exp(mixed), self.tau_min), self.tau_max)
        pl_module.temperature = self.temperature  # type: ignore[assignment]
        pl_module.log("temperature", self.temperature, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """The temperature, and the gradients of the measurement in progress."""
        return {"temperature": self.temperature, "collected": self._collected}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the measurement was."""
        self.temperature = state_dict["temperature"]
        self._collected = state_dict["collected"]
