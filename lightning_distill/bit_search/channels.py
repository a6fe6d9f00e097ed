"""Which channels of a layer matter, and bits for each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def channel_importance(gradient: Tensor, activation: Tensor | None = None, *, channel_dim: int = 1) -> Tensor:
    r"""How much the loss depends on each channel: the sum over samples and positions of absolute gradients.

    .. math:: I_c = \sum |\partial L / \partial h_c| \quad \text{or} \quad \sum |h_c \, \partial L / \partial h_c|

    Args:
        gradient: Of the loss with respect to a layer's output, shape ``(B, C, ...)``.
        activation: The output itself, same shape: then first-order Taylor importance (Molchanov et al. 2017).
        channel_dim: Where the channels are; ``-1`` for ``(B, T, C)``.

    Returns:
        Shape ``(C,)``, not negative, float32 or wider.

    Raises:
        ValueError: If the shapes differ, or there is no dimension beside the channels'.

    Example:
        >>> channel_importance(torch.tensor([[1.0, -2.0], [-3.0, 0.5]]))
        tensor([4.0000, 2.5000])
    """
    if activation is not None and activation.shape != gradient.shape:
        raise ValueError(
            f"`gradient` and `activation` must have the same shape, got {tuple(gradient.shape)} and "
            f"{tuple(activation.shape)}."
        )
    if gradient.ndim < 2:
        raise ValueError(f"`gradient` must have samples and channels, shape (B, C, ...), got {tuple(gradient.shape)}.")
    values = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if activation is not None:
        values = values * activation
    return values.abs().movedim(channel_dim, 0).flatten(1).sum(dim=1)


def channel_bits(importance: Tensor, shares: Sequence[float], bits: Sequence[int]) -> Tensor:
    """Give the most important channels the most bits.

    Args:
        importance: Shape ``(C,)``.
        shares: What part of the channels gets each number of bits, in the order of ``bits``; not negative, sum 1.
            Each part is rounded such that the parts' sum is ``C``.
        bits: Falling: ``(8, 4)`` with ``(0.1, 0.9)`` gives 8 bits to the most important tenth. Equal channels: the
            first goes first.

    Returns:
        Shape ``(C,)``, integers.

    Raises:
        ValueError: If the arguments do not match or are outside their range.

    Example:
        >>> channel_bits(torch.tensor([0.1, 3.0, 0.2, 0.3]), (0.25, 0.75), (8, 4))
        tensor([4, 8, 4, 4])
    """
    if importance.ndim != 1 or not bool(importance.isfinite().all()):
        raise ValueError(f"`importance` must be finite, of shape (C,), got the shape {tuple(importance.shape)}.")
    if len(shares) != len(bits) or not shares or list(bits) != sorted(set(bits), reverse=True):
        raise ValueError(f"`bits` must fall, with one share each, got bits {list(bits)} and shares {list(shares)}.")
    if not (all(share >= 0 for share in shares) and math.isclose(sum(shares), 1, abs_tol=1e-6)):
        raise ValueError(f"`shares` must not be negative and sum to 1, got {list(shares)}.")
    channels = len(importance)
    ends = [round(channels * sum(shares[: i + 1])) for i in range(len(shares))]
    ends[-1] = channels
    ranked = importance.argsort(descending=True, stable=True)
    found = torch.empty(channels, dtype=torch.int64, device=importance.device)
    start = 0
    for end, choice in zip(ends, bits, strict=True):
        found[ranked[start:end]] = choice
        start = end
    return found


__all__ = ["channel_bits", "channel_importance"]
