"""The gradients of the terms over a whole optimizer step, however it is split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from lightning_distill.modules.base import DistillationModule
from lightning_distill.weighting import Live, last_shared_layer, layer_parameters


@dataclass(frozen=True)
class TermGradients:
    """Where the terms pull in one optimizer step.

    Attributes:
        names: Of the terms that were there.
        gradients: Of each term, unweighted, in the layer's parameters: shape ``(T, P)``, float32.
        losses: Of each term, unweighted, shape ``(T,)``.
    """

    names: tuple[str, ...]
    gradients: Tensor
    losses: Tensor

    @property
    def norms(self) -> Tensor:
        """Shape ``(T,)``, float64 on the CPU; not finite where float16 has overflowed."""
        norms: Tensor = torch.linalg.vector_norm(self.gradients, dim=1)
        return norms.double().cpu()

    def cosines(self) -> Tensor:
        """Cosine of each pair, shape ``(T, T)``, float64 on the CPU; 0 with a gradient of length 0."""
        lengths: Tensor = torch.linalg.vector_norm(self.gradients, dim=1, keepdim=True)
        directions = self.gradients / lengths.clamp_min(1e-30)
        return (directions @ directions.T).double().cpu()


class StepGradients:
    """Sums what the micro-batches and processes of one optimizer step contribute to the terms' gradients in one layer.

    Call :meth:`add` before each backward and :meth:`take` before the optimizer steps.

    Args:
        owner: Name of the callback, for messages.
        layer: The student's submodule; ``None`` to find the last one that all terms share.
    """

    def __init__(self, owner: str, layer: str | None) -> None:
        self.owner = owner
        self.layer = layer
        self._over_ranks: Callable[[Tensor], Tensor] | None = None
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._items: int | Tensor = 0

    def add(self, trainer: L.Trainer, module: DistillationModule) -> None:
        """Take in the batch whose backward is about to come.

        Raises:
            ValueError: If a term gives no gradient to the layer.
        """
        live = module.live
        if live is None:
            return
        if self.layer is None:
            self.layer = str(trainer.strategy.broadcast(last_shared_layer(module.student, live.losses)))
        parameters = layer_parameters(module.student, self.layer)
        self._over_ranks = live.over_ranks
        for name, gradient in live.gradients(parameters).items():
            loss = live.losses[name]
            if gradient is None:
                if loss.requires_grad:
                    raise ValueError(self._no_gradient(name, module, live))
                gradient = torch.zeros(sum(p.numel() for p in parameters), device=loss.device)  # constant in this batch
            gradient, value = gradient * live.items, loss.detach() * live.items
            if name in self._sums:
                gradient, value = gradient + self._sums[name][0], value + self._sums[name][1]
            self._sums[name] = gradient, value
        self._items = self._items + live.items

    def take(self) -> TermGradients | None:
        """Gradients and losses of the mean over all items of the step, equal on all processes; then the sums are empty.

        ``None`` if nothing was added.
        """
        sums, items, self._sums, self._items = self._sums, self._items, {}, 0
        if not sums:
            return None
        gradients = torch.stack([gradient for gradient, _ in sums.values()])
        # one message to the other processes: gradients, losses, items
        losses = torch.stack([value.float() for _, value in sums.values()])
        count = torch.as_tensor(items, dtype=torch.float32, device=losses.device)
        packed = torch.cat([gradients.flatten(), losses, count[None]])
        if self._over_ranks is not None:
            packed = self._over_ranks(packed)
        packed = packed / packed[-1].clamp_min(1)
        gradients = packed[: gradients.numel()].view_as(gradients)
        losses = packed[gradients.numel() : -1]
        return TermGradients(tuple(sums), gradients, losses)

    def _no_gradient(self, term: str, module: DistillationModule, live: Live) -> str:
        try:
            advice = f"`layer={last_shared_layer(module.student, live.losses)!r}` is one that all terms reach."
        except ValueError as error:
            advice = str(error)
        return f"{self.owner}: the term {term!r} gives no gradient to the layer {self.layer!r}. {advice}"
