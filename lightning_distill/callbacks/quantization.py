"""Turn the knobs of a quantized student while it is trained."""

from __future__ import annotations

import math
from typing import Any, Literal

import lightning as L
import torch
from torch import nn

from lightning_distill.modules import QADModule
from lightning_distill.quantization import quantized_layers, set_alpha


class QuantizationRamp(L.Callback):
    r"""Let quantization set in little by little: :math:`(1 - \alpha) x + \alpha Q(x)` with ``alpha`` from 0 to 1.

    Liu and Mattina (2019), https://arxiv.org/abs/1911.07190. ``alpha`` is a function of the optimizer step. Validation,
    test and prediction always see the quantized student; so do checkpoints.

    Args:
        end: Share of the training after which quantization is in force in full, in (0, 1].
        shape: ``"linear"`` or ``"cosine"`` (slow at both ends).
        num_steps: Length of the training in optimizer steps. Default: that of the Trainer.

    Raises:
        ValueError: If an argument is outside its range; at the start of a training of unknown length without
            ``num_steps``, or whose student is not quantized.

    Example:
        >>> QuantizationRamp(end=0.5, num_steps=100).alpha_at(25)
        0.5
    """

    def __init__(
        self, end: float = 0.5, shape: Literal["linear", "cosine"] = "linear", num_steps: int | None = None
    ) -> None:
        if not 0 < end <= 1:
            raise ValueError(f"`end` must be in (0, 1], got {end}.")
        if shape not in ("linear", "cosine"):
            raise ValueError(f"`shape` must be 'linear' or 'cosine', got {shape!r}.")
        if num_steps is not None and not num_steps > 0:
            raise ValueError(f"`num_steps` must be positive, got {num_steps}.")
        self.end = end
        self.shape = shape
        self.num_steps = num_steps

    def alpha_at(self, step: int) -> float:
        """``alpha`` in optimizer step ``step``, counted from 0.

        Raises:
            ValueError: If ``num_steps`` is not known yet.
        """
        if self.num_steps is None:
            raise ValueError("`num_steps` is not known before the training starts; pass it to look at the schedule.")
        done = min(step / (self.end * self.num_steps), 1.0)
        return done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the length of the training."""
        if not quantized_layers(pl_module):
            raise ValueError(
                f"QuantizationRamp blends quantization in, but {type(pl_module).__name__} has no quantized layer. Use "
                "a QADModule, or call `prepare(student, spec)`."
            )
        if self.num_steps is None:
            total = trainer.estimated_stepping_batches
            if not 0 < total < math.inf:
                raise ValueError(
                    "`num_steps` of QuantizationRamp must be given: the length of this training is unknown (no "
                    "`max_steps`, `max_epochs`, or a data loader without a length)."
                )
            self.num_steps = int(total)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set ``alpha`` of this step."""
        set_alpha(pl_module, self.alpha_at(trainer.global_step))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Quantize in full whatever is not training."""
        set_alpha(pl_module, 1.0)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave a quantized student behind."""
        set_alpha(pl_module, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """The length of the training."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the ramp that was begun, unless another was asked for."""
        self.num_steps = self.num_steps or state_dict["num_steps"]


class AlternatingQuantization(L.Callback):
    """Train weights and quantizers by turns: block coordinate descent over both, with stochastic steps.

    In the phase of the weights steps of the quantizers stay as they are, and the other way round: what is off duty has
    no gradient, so that an optimizer leaves it, its decay and its moments alone. The phase is a function of the
    optimizer step. With mini-batches a phase may end with a larger loss than it began with; see
    :func:`~lightning_distill.quantization.monotonicity_report`.

    Args:
        weight_steps: Optimizer steps of the first phase, in which weights (and the rest of the network) are trained; at
            least 1.
        quantizer_steps: Optimizer steps of the second phase, at least 1.

    Raises:
        ValueError: If an argument is below 1; at the start of the training if no step is trained.
        TypeError: At the start of the training, if the module is no ``QADModule``.

    Example:
        >>> [AlternatingQuantization(2, 1).phase_at(step) for step in range(4)]
        ['weights', 'weights', 'quantizers', 'weights']
    """

    def __init__(self, weight_steps: int = 100, quantizer_steps: int = 20) -> None:
        for name, value in {"weight_steps": weight_steps, "quantizer_steps": quantizer_steps}.items():
            if not value >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self.weight_steps = weight_steps
        self.quantizer_steps = quantizer_steps

    def phase_at(self, step: int) -> Literal["weights", "quantizers"]:
        """What is trained in optimizer step ``step``, counted from 0."""
        within = step % (self.weight_steps + self.quantizer_steps)
        return "weights" if within < self.weight_steps else "quantizers"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there are two sides."""
        if not isinstance(pl_module, QADModule):
            raise TypeError(f"AlternatingQuantization needs a QADModule, got {type(pl_module).__name__}.")
        if not any(parameter.requires_grad for parameter in pl_module.step_parameters()):
            raise ValueError(
                "AlternatingQuantization trains the steps of quantizers, but none is trained. Use a spec that learns "
                "them: scheme='auto', 'lsq' or 'seq'."
            )

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients of what is off duty away."""
        assert isinstance(pl_module, QADModule)
        steps = {id(parameter) for parameter in pl_module.step_parameters()}
        of_weights = self.phase_at(trainer.global_step) == "weights"
        parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if (id(parameter) in steps) == of_weights:
                parameter.grad = None
