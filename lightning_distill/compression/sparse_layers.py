"""Which layers of a network lose blocks, and how many they have lost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from lightning_distill.compression.blocks import Block, as_block, block_grid, block_norms
from lightning_distill.quantization.layers import QUANTIZED
from lightning_distill.quantization.quantized_layer import QuantizedLayer

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYERS = (*_KINDS, *(QUANTIZED[kind] for kind in _KINDS))
"""Layers whose weights are matrices, or kernels that are read as such."""


@dataclass(frozen=True)
class LayerSparsity:
    """The blocks of one layer.

    Attributes:
        name: Of the layer.
        shape: Of its weight as a matrix: outputs, inputs (of a convolution with the kernel).
        blocks: Rows and columns of blocks.
        kept: Blocks that are not all zeros.
        zeros: Weights that are 0.
    """

    name: str
    shape: tuple[int, int]
    blocks: tuple[int, int]
    kept: int
    zeros: int


@dataclass(frozen=True)
class SparsityReport:
    """Blocks of a network; ``str(report)`` is a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def block_sparsity(self) -> float:
        """Share of these layers' blocks that are all zeros."""
        return 1 - sum(layer.kept for layer in self.layers) / sum(math.prod(layer.blocks) for layer in self.layers)

    @property
    def weight_sparsity(self) -> float:
        """Share of these layers' weights that are 0."""
        return sum(layer.zeros for layer in self.layers) / sum(math.prod(layer.shape) for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [
            f"{layer.name:{width}}  {'x'.join(map(str, layer.shape)):>12}  {layer.kept:>6} of "
            f"{math.prod(layer.blocks):>6} blocks"
            for layer in self.layers
        ]
        return "\n".join(
            [*rows, f"{self.block_sparsity:.1%} of the blocks and {self.weight_sparsity:.1%} of the weights are 0"]
        )


def sparsity_report(
    network: nn.Module, block: str | Block = "avx512", *, layers: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> SparsityReport:
    """How many blocks of ``network`` are all zeros.

    Args:
        network: Any network.
        block: An instruction set or rows and columns; see :func:`~lightning_distill.compression.block_size`.
        layers: See :func:`sparse_layers`.
        skip: See :func:`sparse_layers`.

    Raises:
        ValueError: As :func:`sparse_layers`.

    Example:
        >>> layer = nn.Linear(32, 16)
        >>> _ = nn.init.zeros_(layer.weight[:, 16:])
        >>> print(sparsity_report(nn.Sequential(layer)))
        0         16x32       1 of      2 blocks
        50.0% of the blocks and 50.0% of the weights are 0
    """
    size = as_block(block)
    rows = []
    for name, layer in sparse_layers(network, size, layers=layers, skip=skip).items():
        weight = layer.weight.detach()
        kept = int((block_norms(weight, size) != 0).sum())
        shape = (len(weight), weight[0].numel())
        rows.append(LayerSparsity(name, shape, block_grid(shape, size), kept, int((weight == 0).sum())))
    return SparsityReport(tuple(rows))


def sparse_layers(
    network: nn.Module, block: Block, *, layers: Sequence[str] | None = None, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """The layers of ``network`` that can lose blocks, by name.

    These are ``Linear`` and ``Conv1d`` … ``Conv3d``, quantized or not. ``nn.MultiheadAttention`` is left alone: it does
    not call its layers.

    Args:
        network: Any network.
        block: Rows and columns; must fit into each layer.
        layers: Names or patterns (``"blocks.*.mlp"``). Default: all.
        skip: Names or patterns of layers that are left out.

    Raises:
        ValueError: If a name or pattern fits no layer, nothing is left, a weight is shared with another layer, or a
            layer is smaller than a block.
    """
    candidates = {name: module for name, module in network.named_modules() if type(module) in LAYERS}
    chosen = list(candidates)
    if layers is not None:
        named = {name for pattern in layers for name in _matching(pattern, candidates, "layers")}
        chosen = [name for name in candidates if name in named]
    for pattern in skip:
        left_out = _matching(pattern, candidates, "skip")
        chosen = [name for name in chosen if name not in left_out]
    if not chosen:
        raise ValueError(
            f"{type(network).__name__} has no layer to take blocks from: there are {list(candidates) or 'none'}, and "
            "`layers` and `skip` leave none of them."
        )
    _refuse_shared(network, chosen)
    small = [name for name in chosen if _is_small(candidates[name], block)]
    if small:
        shapes = ", ".join(f"{name!r} ({'x'.join(map(str, _matrix_shape(candidates[name])))})" for name in small)
        raise ValueError(
            f"A block of {block[0]}x{block[1]} is larger than the layers {shapes}. Leave them dense, `skip={small}`, "
            "or choose a smaller `block`."
        )
    return {name: candidates[name] for name in chosen}


def require_zero_level(layers: dict[str, Any]) -> None:
    """Refuse quantized layers that turn a weight of 0 into something else.

    Raises:
        ValueError: If the levels of a layer leave 0 out.
    """
    without = [name for name, layer in layers.items() if isinstance(layer, QuantizedLayer) and not _has_zero(layer)]
    if without:
        bits = sorted({layers[name].weight_bits for name in without})
        raise ValueError(
            f"The quantized layers {without} have no level at 0 ({' or '.join(map(str, bits))} bits, levels half a "
            "step beside it), so that blocks of zeros would not stay zeros. Use scheme='lsq' with 2 bits or more, "
            f"weights='ternary', or leave the layers dense: `skip={without}`."
        )


def _has_zero(layer: QuantizedLayer) -> bool:
    return layer.weight_bits > 8 or layer.weight_grid.has_zero


def _matrix_shape(layer: Any) -> tuple[int, int]:
    shape = tuple(layer.weight.shape)
    return shape[0], math.prod(shape[1:])


def _is_small(layer: Any, block: Block) -> bool:
    rows, columns = _matrix_shape(layer)
    return rows < block[0] or columns < block[1]


def _matching(pattern: str, names: Iterable[str], argument: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(f"`{argument}` has {pattern!r}, which fits no layer with blocks; there are {list(names)}.")
    return found


def _refuse_shared(network: nn.Module, names: Iterable[str]) -> None:
    holders: dict[int, list[str]] = {}
    for name, module in network.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    for name in names:
        if len(shared := holders[id(network.get_submodule(name).weight)]) > 1:
            raise ValueError(
                f"The layers {shared} share one weight, which would lose blocks for all of them. Leave it dense, "
                f"`skip=[{name!r}]`, or give each its own: "
                "`layer.weight = nn.Parameter(layer.weight.detach().clone())`."
            )
