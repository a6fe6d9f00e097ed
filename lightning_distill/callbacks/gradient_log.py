"""Log how strongly the terms pull, and whether they pull together."""

from __future__ import annotations

from itertools import combinations

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from lightning_distill.callbacks.step_gradients import StepGradients
from lightning_distill.callbacks.weighting import distillation_module
from lightning_distill.weighting.shared_layer import layer_parameters


class GradientLog(L.Callback):
    """Log the norm of each term's gradient in one layer, and the cosine between each two.

    As ``train_gradient/<term>`` (of the unweighted term) and ``train_cosine/<term>-<term>``; a negative cosine is a
    conflict. They are those of the whole optimizer step, over all micro-batches and processes. A gradient of length 0
    has cosine 0 with all others.

    Args:
        every_n_steps: How often, in optimizer steps. Each time costs a backward pass per term from the losses to the
            layer.
        layer: Name of the student's submodule; by default as for :class:`~lightning_distill.callbacks.GradNorm`.

    Raises:
        ValueError: If ``every_n_steps`` is below 1; at the start of the training, if there is no such layer or it is
            frozen; in the training, if a term gives no gradient to it.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(self, every_n_steps: int = 50, layer: str | None = None) -> None:
        if not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._step = StepGradients(type(self).__name__, layer)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is such a layer."""
        module = distillation_module(self, pl_module)
        if self._step.layer is not None:
            layer_parameters(module.student, self._step.layer)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Measure this batch, if it is time."""
        if trainer.global_step % self.every_n_steps == 0:
            self._step.add(trainer, distillation_module(self, pl_module))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Log the whole step."""
        found = self._step.take()
        if found is None:
            return
        entry = {f"train_gradient/{name}": norm for name, norm in zip(found.names, found.norms.tolist(), strict=True)}
        cosines = found.cosines()
        for (i, first), (j, second) in combinations(enumerate(found.names), 2):
            entry[f"train_cosine/{first}-{second}"] = cosines[i, j].item()
        pl_module.log_dict(entry, batch_size=1)
