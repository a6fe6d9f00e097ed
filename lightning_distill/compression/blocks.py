"""Blocks of a weight matrix: which sizes hardware likes, and what each block is worth."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.hardware.alignment import VECTOR_BITS, simd_width
from lightning_distill.losses.soft_targets import wide

Block = tuple[int, int]

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


def bits_of_present(mask: Tensor, weight: Tensor, block: Block) -> Tensor | None:
    """For :func:`set_to_zero`: whole numbers as wide as ``weight``'s, all bits set where ``mask`` keeps the block.

    ``None`` where all blocks are there.
    """
    if mask.all():
        return None
    widths = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return -element_mask(mask, tuple(weight.shape), block).to(weight.device, widths[weight.element_size()])


def set_to_zero(values: Tensor, present: Tensor | None) -> None:
    """Set what has gone to +0, in place, whatever it was.

    NaN times 0 would be NaN, and ``masked_fill_`` takes far longer.

    Args:
        values: A weight, or its gradient.
        present: What :func:`bits_of_present` made of the mask.

    Example:
        >>> weight = torch.tensor([[float("nan"), 3.0]])
        >>> set_to_zero(weight, bits_of_present(torch.tensor([[False, True]]), weight, (1, 1)))
        >>> weight
        tensor([[0., 3.]])
    """
    if present is not None:
        values.detach().view(present.dtype).bitwise_and_(present)
