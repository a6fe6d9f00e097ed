"""Channels in blocks of one vector, as convolution kernels for CPUs hold them."""

import torch.nn.functional as F
from torch import Tensor


def to_nchwc(x: Tensor, v: int) -> Tensor:
    """Put the channels into blocks of ``v`` that lie side by side; the last block is filled up with zeros.

    PyTorch itself offers ``x.to(memory_format=torch.channels_last)``, and its CPU kernels choose blocks on their own;
    this is for kernels of one's own, and to see what changing the layout costs (``scripts/benchmark_layout.py``).

    Args:
        x: Shape ``(N, C, *spatial)`` with any number of spatial dimensions.
        v: Values per vector, see :func:`~lightning_distill.hardware.simd_width`; positive.

    Returns:
        Contiguous, shape ``(N, ceil(C / v), *spatial, v)``.

    Raises:
        ValueError: If ``v`` is not positive or ``x`` has no channels.

    Example:
        >>> import torch
        >>> to_nchwc(torch.arange(3.0).view(1, 3, 1), 2)
        tensor([[[[0., 1.]],
        <BLANKLINE>
                 [[2., 0.]]]])
    """
    if v < 1:
        raise ValueError(f"`v` must be positive, got {v}.")
    if x.ndim < 2 or x.shape[1] < 1:
        raise ValueError(f"`x` must have shape (N, C, ...) with at least one channel, got {tuple(x.shape)}.")
    missing = -x.shape[1] % v
    filled = F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing]) if missing else x
    blocks: Tensor = filled.unflatten(1, (-1, v))
    return blocks.movedim(2, -1).contiguous()


def from_nchwc(y: Tensor, channels: int) -> Tensor:
    """What :func:`to_nchwc` was given: its inverse.

    Args:
        y: Shape ``(N, blocks, *spatial, v)``.
        channels: Channels without the filling; they must need all blocks.

    Returns:
        Contiguous, shape ``(N, channels, *spatial)``.

    Raises:
        ValueError: If ``channels`` does not fit the blocks.
    """
    if y.ndim < 3:
        raise ValueError(f"`y` must have shape (N, blocks, ..., v), got {tuple(y.shape)}.")
    blocks, v = y.shape[1], y.shape[-1]
    if not (blocks - 1) * v < channels <= blocks * v:
        raise ValueError(
            f"`channels` must be from {(blocks - 1) * v + 1} to {blocks * v} for {blocks} blocks of {v}, "
            f"got {channels}."
        )
    return y.movedim(-1, 2).flatten(1, 2)[:, :channels].contiguous()


def pad_to_cacheline(nbytes: int, line: int = 64) -> int:
    """``nbytes`` rounded up to whole cache lines of ``line`` bytes.

    Raises:
        ValueError: If ``nbytes`` is negative or ``line`` is not positive.

    Example:
        >>> [pad_to_cacheline(n) for n in (1, 64, 65)]
        [64, 64, 128]
    """
    if nbytes < 0 or line < 1:
        raise ValueError(f"`nbytes` must be at least 0 and `line` positive, got {nbytes} and {line}.")
    return -(-nbytes // line) * line
