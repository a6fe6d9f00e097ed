"""Learning rate from how well the gradients of two terms agree."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_distill.callbacks.term_gradients import gradient_rows, require_terms, student_layer
from lightning_distill.difficulty import alignment_factor, gradient_cosine


class GradientAlignment(L.Callback):
    r"""Multiply the learning rate by :math:`e^{-\alpha (1 - S)}`, where ``S`` is the cosine of two terms' gradients.

    Where labels and teacher pull in opposite directions the steps get smaller, where they agree the learning rate is
    that of the schedule. The factor is applied during the optimizer's step alone, so that schedulers see their own
    learning rates. ``S`` is a running mean of the cosine between the gradients of whole optimizer steps, over all
    micro-batches (which count alike) and processes; it is in the checkpoint.

    Logs ``gradient_cosine`` and ``lr_factor``. Each measurement costs a backward pass from both terms to ``layer``.

    Args:
        alpha: How much a conflict costs, not negative; the factor is at least ``exp(-2 * alpha)``.
        momentum: Share of the old mean after a measurement, in [0, 1).
        every_n_steps: Measure in every n-th optimizer step, positive.
        layer: Submodule of the student whose parameters' gradients are compared; by default the last one.
        first: Name of one term.
        second: Name of the other.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training if the module has no such terms or
            layer.
        TypeError: At the start of the training, if the module has no named terms.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        momentum: float = 0.9,
        every_n_steps: int = 1,
        layer: str | None = None,
        first: str = "hard",
        second: str = "soft",
    ) -> None:
        alignment_factor(0.0, alpha=alpha)  # checks the value
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        if not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be positive, got {every_n_steps}.")
        self.alpha = alpha
        self.momentum = momentum
        self.every_n_steps = every_n_steps
        self.layer = layer
        self.terms = (first, second)
        self.cosine: float | None = None
        self._parameters: list[nn.Parameter] = []
        self._sum: Tensor | None = None  # (2, P)
        self._rates: list[tuple[dict[str, Any], Any]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def factor(self) -> float:
        """By what the learning rate is multiplied; 1 before the first measurement."""
        return 1.0 if self.cosine is None else alignment_factor(self.cosine, alpha=self.alpha)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the terms and find the layer."""
        require_terms(self, pl_module, self.terms)
        self._parameters = student_layer(pl_module, self.layer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Be there when the optimizers step."""
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._scale))
            self._handles.append(optimizer.register_step_post_hook(self._put_back))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Look at the two gradients of this micro-batch."""
        if trainer.global_step % self.every_n_steps == 0:
            found = gradient_rows(pl_module, self.terms, self._parameters)
            self._sum = found if self._sum is None else self._sum + found

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Compare the gradients of this step, over all processes."""
        if self._sum is None:
            return
        total, self._sum = self._sum, None
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total, reduce_op="mean")
        if bool(total.isfinite().all()):  # else it is an overflow of float16, at which the step is skipped
            cosine = gradient_cosine(total[0], total[1])
            self.cosine = cosine if self.cosine is None else self.momentum * self.cosine + (1 - self.momentum) * cosine
            pl_module.log_dict({"gradient_cosine": cosine, "lr_factor": self.factor}, batch_size=1)
            self._apply()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the schedule's learning rates to whoever saves a checkpoint now."""
        self._put_back()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the optimizers alone again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        """The running cosine."""
        return {"cosine": self.cosine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.cosine = state_dict["cosine"]

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # Forward and backward run inside the optimizer's step, so that the factor of this very step comes later; with
        # a gradient scaler they run before it, and a step that is skipped never gets here.
        self._rates = [(group, group["lr"]) for group in optimizer.param_groups]
        self._apply()

    def _apply(self) -> None:
        for group, rate in self._rates:
            group["lr"] = rate * self.factor

    def _put_back(self, *_: Any) -> None:
        for group, rate in self._rates:
            group["lr"] = rate
        self._rates = []
