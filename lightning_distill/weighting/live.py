"""A training batch between its forward and its backward: the losses of its terms, with their graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_distill.measuring import measuring
from lightning_distill.outputs import Step


@dataclass
class Live:
    """What callbacks and weightings get to see of the batch that is being trained on.

    Attributes:
        step: The batch.
        compute: Gives the losses of ``step``; called when somebody first asks for :attr:`losses`.
        items: How many items those are. The loss of an optimizer step is the mean over all of its items, so
            sums over batches and processes go with this weight.
        over_ranks: Mean of a tensor over the processes; ``None`` if there is one process.
        scaler: The gradient scaler of mixed precision with float16, if there is one.
    """

    step: Step
    compute: Callable[[Step], Mapping[str, Tensor]]
    items: int | Tensor
    over_ranks: Callable[[Tensor], Tensor] | None = None
    scaler: Any = None

    @cached_property
    def losses(self) -> Mapping[str, Tensor]:
        """Loss of each term, unweighted: scalars with their graph, means over this batch's items on this process."""
        return self.compute(self.step)

    def gradients(self, inputs: Sequence[Tensor]) -> dict[str, Tensor | None]:
        """Gradient of each term with respect to ``inputs``; see :func:`term_gradients`."""
        scale = float(self.scaler.get_scale()) if self.scaler is not None and self.scaler.is_enabled() else 1.0
        return term_gradients(self.losses, inputs, scale=scale)


def term_gradients(
    losses: Mapping[str, Tensor], inputs: Sequence[Tensor], *, scale: float = 1.0
) -> dict[str, Tensor | None]:
    """Gradient of each loss with respect to ``inputs``, as one flat vector; the graph stays for the backward to come.

    No ``.grad`` is touched and no hook of a parameter fires, so that it is safe under DDP.

    Args:
        losses: Scalars by name.
        inputs: Tensors that require a gradient.
        scale: By how much losses are multiplied on the way, so that float16 gradients do not vanish; taken out again.

    Returns:
        By name: shape ``(number of elements in inputs,)``, float32 or wider, zero where a part of ``inputs`` is not
        reached; ``None`` if nothing of it is.
    """
    found: dict[str, Tensor | None] = {}
    for name, loss in losses.items():
        parts: Sequence[Tensor | None] = [None] * len(inputs)
        if loss.requires_grad:
            with measuring():
                parts = torch.autograd.grad(loss * scale, inputs, retain_graph=True, allow_unused=True)
        if all(part is None for part in parts):
            found[name] = None
            continue
        dtype = torch.promote_types(inputs[0].dtype, torch.float32)
        flat = [
            (torch.zeros_like(of) if part is None else part).flatten().to(dtype)
            for of, part in zip(inputs, parts, strict=True)
        ]
        found[name] = torch.cat(flat) / scale
    return found
