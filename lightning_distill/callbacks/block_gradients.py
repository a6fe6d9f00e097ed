"""How large the gradient of each block was since blocks were last chosen by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_distill.compression.blocks import Block, block_norms


class BlockGradients:
    """Sums the squared norms of the blocks' gradients over optimizer steps, by layer.

    Once blocks were chosen by them (:meth:`close`), the next gradient of a layer begins a new sum; a layer without one,
    since something else keeps it from being trained for a while, keeps the old.

    Args:
        block: Rows and columns of a block.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self._squares: dict[str, Tensor] = {}
        self._used: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._squares)

    def add(self, gradients: Mapping[str, Tensor], *, finite_only: bool = False) -> None:
        """Take the gradients of one optimizer step in.

        Args:
            gradients: By layer, shapes of the weights.
            finite_only: Whether to leave a step out of which something is not finite.
        """
        seen = {name: block_norms(gradient, self.block).square() for name, gradient in gradients.items()}
        if finite_only and not all(squares.isfinite().all() for squares in seen.values()):
            return
        for name, squares in seen.items():
            if name in self._squares and name not in self._used:
                squares += self._squares[name]
            self._squares[name] = squares
            self._used.discard(name)

    def norms(self, name: str, like: Tensor) -> Tensor:
        """Root mean square of each block's norm, but for a factor that all layers share; 0 of a layer never seen.

        Args:
            name: Of the layer.
            like: Something of the shape of its blocks.
        """
        return self._squares[name].sqrt() if name in self._squares else torch.zeros_like(like)

    def close(self) -> None:
        """Blocks were chosen by what was seen so far."""
        self._used = set(self._squares)

    def to(self, devices: Mapping[str, torch.device]) -> None:
        """Move the sums to the devices of their layers."""
        self._squares = {name: squares.to(devices[name]) for name, squares in self._squares.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums, and which of them are used."""
        return {"squares": dict(self._squares), "used": sorted(self._used)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was."""
        self._squares, self._used = dict(state["squares"]), set(state["used"])
