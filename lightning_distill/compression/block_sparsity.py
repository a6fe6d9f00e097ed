"""Blocks of a weight matrix: which sizes hardware likes, what each is worth, and which are given up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.hardware.alignment import VECTOR_BITS, simd_width
from lightning_distill.losses.soft_targets import wide

Block = tuple[int, int]
Scope = Literal["layer", "global"]

BLOCK_SIZES: dict[str, tuple[Block, ...]] = {
    "neon": ((4, 4), (8, 8)),
    "avx512": ((16, 16),),
    "tensor_core": ((16, 16), (32, 8)),
}
"""Rows and columns of the blocks that an instruction set works on. 32x8 is the shape m32n8k16 of a matrix fragment."""


def block_size(isa: str, bits: int = 32) -> Block:
    """The block of an instruction set for values of ``bits`` bits.

    The largest of :data:`BLOCK_SIZES` that is no wider than a vector register; the first one where none is, and for
    tensor cores, which have fragments instead.

    Args:
        isa: ``"neon"``, ``"avx512"`` or ``"tensor_core"``.
        bits: Width of a weight: 8, 16, 32 or 64.

    Raises:
        ValueError: If ``isa`` or ``bits`` is unknown.

    Example:
        >>> block_size("neon"), block_size("neon", bits=8), block_size("avx512")
        ((4, 4), (8, 8), (16, 16))
    """
    if isa not in BLOCK_SIZES:
        raise ValueError(f"`isa` must be one of {sorted(BLOCK_SIZES)}, got {isa!r}.")
    sizes = BLOCK_SIZES[isa]
    if isa not in VECTOR_BITS:
        return sizes[0]
    lanes = simd_width(isa, bits)
    return next((size for size in reversed(sizes) if size[1] <= lanes), sizes[0])


def as_block(block: str | tuple[int, ...]) -> Block:
    """Rows and columns of ``block``: an instruction set, as in :func:`block_size`, or two numbers.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(block, str):
        return block_size(block)
    sides = tuple(block)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(
            f"`block` must be two positive whole numbers, rows and columns, or one of {sorted(BLOCK_SIZES)}, "
            f"got {block!r}."
        )
    return sides[0], sides[1]


def block_grid(shape: tuple[int, ...], block: Block) -> tuple[int, int]:
    """Rows and columns of blocks in a weight of ``shape``, read as a matrix ``(out, everything else)``."""
    rows, columns = shape[0], math.prod(shape[1:])
    return -(-rows // block[0]), -(-columns // block[1])


def block_norms(weight: Tensor, block: Block) -> Tensor:
    """Frobenius norm of each block.

    Args:
        weight: Shape ``(out, ...)``; what follows the outputs is one side of the matrix (inputs times kernel).
        block: Rows and columns of a block. Blocks at the edges may be smaller: they are filled up with zeros.

    Returns:
        Shape ``(rows of blocks, columns of blocks)``, float32 or wider.

    Raises:
        ValueError: If ``weight`` has fewer than two dimensions or none of its sides has a length.

    Example:
        >>> block_norms(torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]]), (2, 2))
        tensor([[5., 2.]])
    """
    if weight.ndim < 2 or weight.numel() == 0:
        raise ValueError(f"`weight` must be a matrix, or a kernel, that is not empty, got shape {tuple(weight.shape)}.")
    matrix = wide(weight).flatten(1)
    rows, columns = block_grid(tuple(matrix.shape), block)
    missing = (0, columns * block[1] - matrix.shape[1], 0, rows * block[0] - matrix.shape[0])
    if any(missing):
        matrix = F.pad(matrix, missing)
    squares = matrix.square()  # summed along the side that is far apart in memory first: several times faster
    if block[0] > 1:
        squares = squares.view(rows, block[0], -1).sum(dim=1)
    if block[1] > 1:
        squares = squares.view(rows, columns, block[1]).sum(dim=2)
    return squares.sqrt_()


def block_importance(weight: Tensor, gradient: Tensor, block: Block) -> Tensor:
    r"""What the loss may lose with a block: :math:`\|W_b\|_F \, \|\nabla_b L\|_F`.

    To first order, setting a block to 0 changes the loss by :math:`-\langle W_b, \nabla_b L \rangle`, whose magnitude
    is at most this product (Cauchy and Schwarz). A block of zeros is worth nothing, whatever its gradient.

    Args:
        weight: Shape ``(out, ...)``, see :func:`block_norms`.
        gradient: Of the loss, same shape.
        block: Rows and columns.

    Returns:
        Shape ``(rows of blocks, columns of blocks)``, float32 or wider.

    Raises:
        ValueError: If the shapes differ or are no matrix.

    Example:
        >>> block_importance(torch.tensor([[3.0, 4.0, 1.0]]), torch.tensor([[0.0, 2.0, 0.5]]), (1, 2))
        tensor([[10.0000,  0.5000]])
    """
    if weight.shape != gradient.shape:
        raise ValueError(
            f"`weight` and `gradient` must have the same shape, got {tuple(weight.shape)} and {tuple(gradient.shape)}."
        )
    return block_norms(weight, block) * block_norms(gradient, block)


def block_mask(importance: Tensor, sparsity: float, *, kept: Tensor | None = None) -> Tensor:
    """Which blocks stay: all but the share ``sparsity`` that is worth least, rounded to a whole block.

    Args:
        importance: Of each block, shape ``(rows, columns)``.
        sparsity: Share of the blocks that goes, in [0, 1). One block always stays.
        kept: Blocks that are still there, boolean, same shape; the others stay gone. Default: all.

    Returns:
        Boolean, same shape. Of equally important blocks the first ones go, row by row.

    Raises:
        ValueError: If ``sparsity`` is outside [0, 1), or an importance is not finite.

    Example:
        >>> block_mask(torch.tensor([[0.3, 0.1], [0.2, 0.4]]), 0.5)
        tensor([[ True, False],
                [False,  True]])
    """
    return block_masks({"": importance}, sparsity, kept=None if kept is None else {"": kept})[""]


def block_masks(
    importance: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: Scope = "layer",
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Which blocks of several layers stay; see :func:`block_mask`.

    Args:
        importance: Of the blocks of each layer, shapes ``(rows, columns)``.
        sparsity: Share of the blocks that goes, in [0, 1).
        scope: ``"layer"``: of each layer; ``"global"``: of all together, the least important ones wherever they are.
            Each layer keeps its most important block.
        kept: Blocks that are still there, by layer, at least one in each; the others stay gone. Default: all.

    Returns:
        Boolean masks on the CPU, by layer.

    Raises:
        ValueError: If ``sparsity`` is outside [0, 1), ``scope`` is unknown, or an importance is not finite.
    """
    check_sparsity("sparsity", sparsity)
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be 'layer' or 'global', got {scope!r}.")
    if kept is None:
        kept = {name: torch.ones_like(values, dtype=torch.bool) for name, values in importance.items()}
    worth = {name: _worth(name, values, kept[name]) for name, values in importance.items()}
    if scope == "layer":
        chosen = {name: _most_valuable(values, sparsity) for name, values in worth.items()}
    else:
        together = _most_valuable(torch.cat(list(worth.values())), sparsity)
        chosen = dict(zip(worth, together.split([len(values) for values in worth.values()]), strict=True))
    return {name: mask.view(importance[name].shape) for name, mask in chosen.items()}


def element_mask(mask: Tensor, shape: tuple[int, ...], block: Block) -> Tensor:
    """``mask`` over blocks as one over weights of ``shape``; boolean.

    Raises:
        ValueError: If ``mask`` does not have the blocks of such a weight.

    Example:
        >>> element_mask(torch.tensor([[True, False]]), (1, 3), (1, 2))
        tensor([[ True,  True, False]])
    """
    if tuple(mask.shape) != block_grid(shape, block):
        raise ValueError(
            f"A weight of shape {tuple(shape)} has {block_grid(shape, block)} blocks of {block[0]}x{block[1]}, but "
            f"`mask` has {tuple(mask.shape)}."
        )
    whole = mask.repeat_interleave(block[0], dim=0).repeat_interleave(block[1], dim=1)
    return whole[: shape[0], : math.prod(shape[1:])].reshape(shape)


def cubic_sparsity(step: float, *, start: float, end: float, final: float, initial: float = 0.0) -> float:
    r"""Sparsity that rises fast at first and slowly at the end.

    .. math:: s(t) = s_f + (s_i - s_f) \left( 1 - \frac{t - t_0}{t_1 - t_0} \right)^3

    from ``initial`` before ``start`` to ``final`` from ``end`` on: Zhu and Gupta (2017), section 3,
    https://arxiv.org/abs/1710.01878.

    Args:
        step: Optimizer steps done.
        start: Step at which it begins to rise, not negative.
        end: Step at which it arrives, at least ``start``; where both are equal it jumps.
        final: In [0, 1).
        initial: In [0, 1), at most ``final``.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> [round(cubic_sparsity(step, start=0, end=10, final=0.8), 3) for step in (0, 5, 10)]
        [0.0, 0.7, 0.8]
    """
    check_sparsity("final", final)
    check_sparsity("initial", initial)
    if not initial <= final:
        raise ValueError(f"`initial` must be at most `final`, since blocks do not return, got {initial} and {final}.")
    if not 0 <= start <= end < math.inf:
        raise ValueError(f"`start` must not be negative and `end` not be before it, got {start} and {end}.")
    if step < start:
        return initial
    if step >= end:
        return final
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** 3


def check_sparsity(name: str, value: float) -> None:
    """Refuse a share of blocks that would leave nothing.

    Raises:
        ValueError: If it is outside [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"`{name}`, a share of blocks, must be in [0, 1), got {value}.")


def _worth(name: str, importance: Tensor, kept: Tensor) -> Tensor:
    """What each block is worth: nothing at all where it has gone, everything for the layer's best one."""
    values = importance.detach().double().cpu().flatten()
    of_layer = f" of {name!r}" if name else ""
    if not values.isfinite().all():
        raise ValueError(
            f"The importance of blocks{of_layer} is not finite: weights or gradients are NaN or infinite. Lower the "
            "learning rate or clip gradients."
        )
    still_there = kept.cpu().flatten()
    if not still_there.any():
        raise ValueError(f"`kept` has no block{of_layer}; one must stay.")
    values = torch.where(still_there, values, -math.inf)
    values[(values == values.max()).nonzero()[-1]] = math.inf
    return values


def _most_valuable(worth: Tensor, sparsity: float) -> Tensor:
    """Mask without the least valuable of the blocks; those that have gone or must stay are not up for choice."""
    wanted = math.floor(sparsity * len(worth) + 0.5)
    going = min(max(wanted, int((worth == -math.inf).sum())), len(worth) - int((worth == math.inf).sum()))
    if going == 0:
        return torch.ones(len(worth), dtype=torch.bool)
    limit = worth.kthvalue(going).values  # many times faster than sorting millions of single weights
    mask = worth > limit
    equal = (worth == limit).nonzero().flatten()
    mask[equal[going - int((worth < limit).sum()) :]] = True
    return mask
