"""Balance the terms by the norms of their gradients."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.callbacks.step_gradients import StepGradients, TermGradients
from lightning_distill.callbacks.weighting import distillation_module, fixed_weights
from lightning_distill.weighting import gradnorm_step, gradnorm_weights, training_rates
from lightning_distill.weighting.shared_layer import layer_parameters
from lightning_distill.weighting.weighting import check_several


class GradNorm(L.Callback):
    """Turn the weights such that the terms' gradients have norms in proportion to how slowly the terms learn.

    Every ``every_n_steps`` optimizer steps it measures, in one layer that the terms share, the norm of each term's
    gradient over the whole step (all micro-batches and processes), and moves the weights by the step of Chen et al.
    (2018, https://arxiv.org/abs/1711.02257): :func:`~lightning_distill.weighting.gradnorm_step`, with norms in units of
    their mean, so that the scale of the losses does not matter. Without ``lr`` it goes at once to the balance,
    :func:`~lightning_distill.weighting.gradnorm_weights`. The weights start as the module's constant weights,
    and their sum stays what it was: with ``alpha=0.5`` of ``KD``, 1. New weights count from the next step on.

    They are equal on all processes, do not depend on how a step is split, and continue where they were after a resume:
    weights, first losses and the name of the layer are the callback's state. Steps whose float16 gradients overflow are
    left out. Terms absent from a step keep their weights.

    Args:
        alpha: How much more a slow term is to pull, not negative; 0 asks for equal norms.
        lr: Step size of the weights; ``None`` jumps to the balance.
        every_n_steps: How often. Each time costs a backward pass per term from the losses to the layer.
        layer: Name of the student's submodule. By default the last one with a trainable weight matrix of its own that
            gets a gradient from every term in the first batch (one whole backward pass per term, once).

    Raises:
        ValueError: If a value is outside its range; at the start of the training, if there is no such layer (with the
            nearest names), it is frozen, there is one term only, or something else weighs the terms; in the training,
            if a term gives no gradient to the layer.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.

    Example:
        >>> from lightning_distill.callbacks import GradNorm
        >>> trainer = L.Trainer(callbacks=[GradNorm(alpha=0.5)], logger=False, accelerator="cpu")
    """

    def __init__(
        self, alpha: float = 1.5, lr: float | None = 0.025, every_n_steps: int = 10, layer: str | None = None
    ) -> None:
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"`alpha` must not be negative, got {alpha}.")
        if lr is not None and not 0 < lr < float("inf"):
            raise ValueError(f"`lr` must be positive, or None for the balance at once, got {lr}.")
        if not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.alpha = alpha
        self.lr = lr
        self.every_n_steps = every_n_steps
        self.layer = layer
        self.first_losses: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._step = StepGradients(type(self).__name__, layer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check what is needed; go on with the weights of a resumed run."""
        weighting = fixed_weights(self, pl_module)
        check_several(type(self).__name__, list(weighting.values))
        if self._step.layer is not None:
            layer_parameters(distillation_module(self, pl_module).student, self._step.layer)
        weighting.values.update({name: w for name, w in self._weights.items() if name in weighting.values})

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Measure this batch, if it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            self._step.add(trainer, distillation_module(self, pl_module))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Move the weights by what the whole step has measured."""
        found = self._step.take()
        if found is None or not bool(found.norms.isfinite().all()):
            return
        self._weights = self.balanced(fixed_weights(self, pl_module).values, found)
        fixed_weights(self, pl_module).values.update(self._weights)

    def balanced(self, weights: dict[str, float], found: TermGradients) -> dict[str, float]:
        """The weights after a measurement; those of terms that were not measured stay as they are."""
        losses, norms = dict(zip(found.names, found.losses.tolist(), strict=True)), found.norms
        for name, loss in losses.items():
            if loss > 0:  # a term whose loss is 0 has not begun
                self.first_losses.setdefault(name, loss)
        there = [place for place, name in enumerate(found.names) if name in self.first_losses and norms[place] > 0]
        names = [found.names[place] for place in there]
        if len(names) < 2:
            return dict(weights)
        norms = norms[there]
        rates = training_rates(_vector(losses, names), _vector(self.first_losses, names))
        present = _vector(weights, names)
        if self.lr is None:
            moved = gradnorm_weights(norms, rates, alpha=self.alpha, total=float(present.sum()))
        else:
            moved = gradnorm_step(present, norms / norms.mean(), rates, alpha=self.alpha, lr=self.lr)
        return dict(weights) | dict(zip(names, moved.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Weights, first losses and the layer."""
        return {"weights": dict(self._weights), "first_losses": dict(self.first_losses), "layer": self._step.layer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run was; a layer that was asked for stays."""
        self._weights = dict(state_dict["weights"])
        self.first_losses = dict(state_dict["first_losses"])
        self._step.layer = self.layer or state_dict["layer"]


def _vector(values: dict[str, float], names: list[str]) -> Tensor:
    return torch.tensor([values[name] for name in names], dtype=torch.float64)
