"""Balance the terms by the size of their losses."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.callbacks.weighting import distillation_module, fixed_weights
from lightning_distill.weighting import inverse_magnitude_weights
from lightning_distill.weighting.weighting import check_several


class BalancedMagnitudes(L.Callback):
    """Weigh each term by the inverse of a running mean of its loss, so that all contribute the same.

    The constant weights of the module become shares: with ``{"hard": 0.3, "soft": 0.7}`` the soft term contributes 7/3
    of what the hard one does. The sum of the weights stays what it was. The losses are means over the whole optimizer
    step, so that the weights are equal on all processes and do not depend on how a step is split; a step's weights come
    from the steps before it. The first step has the constant weights.

    Args:
        decay: Of the running mean per measurement, in [0, 1); the start is corrected for.
        every_n_steps: How often losses are measured, in optimizer steps; each time waits for the device once.

    Raises:
        ValueError: If a value is outside its range; at the start of the training, if there is one term only, or
            something else weighs the terms.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(self, decay: float = 0.9, every_n_steps: int = 10) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {decay}.")
        if not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.decay = decay
        self.every_n_steps = every_n_steps
        self.shares: dict[str, float] = {}
        self._means: dict[str, tuple[float, float]] = {}  # sum and weight of the running mean
        self._sums: dict[str, Tensor] = {}
        self._items: int | Tensor = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the shares, or go on with those of a resumed run."""
        weights = fixed_weights(self, pl_module).values
        check_several(type(self).__name__, list(weights))
        if not self.shares:
            self.shares = dict(weights)
        weights.update(self.weights())

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Take in the losses of this batch, if it is time."""
        live = distillation_module(self, pl_module).live
        if live is None or trainer.global_step % self.every_n_steps:
            return
        for name, value in live.losses.items():
            value = value.detach().float() * live.items
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._items = self._items + live.items

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Move the weights by the losses of the whole step."""
        sums, items, self._sums, self._items = self._sums, self._items, {}, 0
        if not sums:
            return
        live = distillation_module(self, pl_module)
        values = torch.stack([*sums.values(), torch.as_tensor(items, device=live.device).float()])
        if trainer.world_size > 1:
            reduced = trainer.strategy.reduce(values, reduce_op="mean")
            assert isinstance(reduced, Tensor)
            values = reduced
        *losses, count = values.tolist()
        for name, loss in zip(sums, losses, strict=True):
            total, weight = self._means.get(name, (0.0, 0.0))
            new = loss / max(count, 1.0)
            self._means[name] = self.decay * total + new, self.decay * weight + 1
        fixed_weights(self, pl_module).values.update(self.weights())

    def weights(self) -> dict[str, float]:
        """The weights by the running means so far; the constant ones of terms that were not seen.

        Raises:
            ValueError: If a running mean is negative: such losses have no magnitude to balance.
        """
        means = {name: total / weight for name, (total, weight) in self._means.items()}
        if negative := {name: mean for name, mean in means.items() if not mean >= 0}:
            raise ValueError(
                f"{type(self).__name__} needs losses whose mean is not negative, got {negative}; leave it out."
            )
        names = [name for name in self.shares if means.get(name, 0.0) > 0 and self.shares[name] > 0]
        if len(names) < 2:
            return dict(self.shares)
        magnitudes = torch.tensor([means[name] / self.shares[name] for name in names], dtype=torch.float64)
        balanced = inverse_magnitude_weights(magnitudes, total=sum(self.shares[name] for name in names))
        return self.shares | dict(zip(names, balanced.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Shares and running means."""
        return {"shares": dict(self.shares), "means": {name: list(mean) for name, mean in self._means.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was."""
        self.shares = dict(state_dict["shares"])
        self._means = {name: (total, weight) for name, (total, weight) in state_dict["means"].items()}
