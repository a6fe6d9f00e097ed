"""Which channels of a layer matter, and bits for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_distill.bit_search.allocate import Table


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


def allocate_channels(
    errors: Mapping[str, Tensor], sizes: Mapping[str, int], bits: Sequence[int], budget: float
) -> dict[str, tuple[int, ...]]:
    r"""Choose the bits of each channel of each layer such that the errors' sum is small and storage within ``budget``.

    There is a price of a bit :math:`\lambda` at which each channel alone takes the bits of least
    :math:`E_c(b) + \lambda n_c b`, and the least price within the budget is found by bisection (Everett 1963). What the
    budget still holds goes to the channels that gain most by it. Unlike
    :func:`~lightning_distill.bit_search.allocate_bits` that is not exact, but no plan is better by more than the gain
    of a single channel, and a million channels take seconds.

    Args:
        errors: By layer, shape ``(channels, numbers of bits)``: what each channel costs in quality. Infinite where a
            channel shall not have these bits.
        sizes: Elements of each layer's weight.
        bits: The choices, rising.
        budget: Largest storage in bits.

    Returns:
        Bits of each channel by layer.

    Raises:
        ValueError: If shapes or names do not match, an error is NaN or a channel has no finite one, or the
            fewest bits are over the budget.

    Example:
        >>> allocate_channels({"a": torch.tensor([[9.0, 0.0], [1.0, 0.0]])}, {"a": 20}, (2, 8), budget=100)
        {'a': (8, 2)}
    """
    if list(bits) != sorted(set(bits)) or not bits:
        raise ValueError(f"`bits` must rise, got {list(bits)}.")
    if errors.keys() != sizes.keys() or not errors:
        raise ValueError(f"`errors` and `sizes` must have the same layers, got {list(errors)} and {list(sizes)}.")
    for layer, own in errors.items():
        if own.ndim != 2 or own.shape[1] != len(bits):
            raise ValueError(f"`errors` of {layer!r} must be of shape (channels, {len(bits)}), got {tuple(own.shape)}.")
        if not bool((own > -math.inf).all() and own.isfinite().any(dim=1).all()):  # a NaN is not larger
            raise ValueError(
                f"`errors` of {layer!r} must be numbers, infinite where a channel shall not have these bits, "
                "and finite somewhere in each row."
            )
    error = torch.cat([own.double().cpu() for own in errors.values()]).numpy()
    each = np.concatenate([np.full(len(own), sizes[layer] / len(own)) for layer, own in errors.items()])
    cost = each[:, None] * np.array(bits, dtype=float)
    if not budget >= (least := float(np.where(np.isfinite(error), cost, np.inf).min(axis=1).sum())):
        raise ValueError(
            f"`budget` is {budget:g}, but the cheapest plan costs {least:g}. Raise it, or allow fewer bits."
        )
    chosen = _fill(error, cost, _at_price(error, cost, budget), budget)
    found = np.array(bits)[chosen].tolist()
    ends = np.cumsum([len(own) for own in errors.values()])
    return {layer: tuple(found[end - len(own) : end]) for (layer, own), end in zip(errors.items(), ends, strict=True)}


def channel_shares(errors: Mapping[str, Tensor], layers: Table, bits: Sequence[int]) -> dict[str, Tensor]:
    """Errors of whole layers, divided among their channels as ``errors`` has it.

    Args:
        errors: An estimate for each channel: by layer, shape ``(channels, numbers of bits)``, not negative.
        layers: What was measured for the layer as a whole.
        bits: The numbers of bits.

    Returns:
        By layer, of the shape of ``errors``, float64, with the sums of ``layers``.

    Example:
        >>> channel_shares({"a": torch.tensor([[3.0], [1.0]])}, {"a": {2: 0.8}}, (2,))["a"].tolist()
        [[0.6000000000000001], [0.2]]
    """
    found = {}
    for layer, own in errors.items():
        measured = torch.tensor([layers[layer][choice] for choice in bits], dtype=torch.float64)
        estimated = own.double().cpu()
        found[layer] = estimated * measured / estimated.sum(dim=0).clamp_min(1e-300)
    return found


def _at_price(error: np.ndarray, cost: np.ndarray, budget: float) -> np.ndarray:
    """The choice of each row at the least price at which all are within the budget, up to rounding."""

    def at(price: float) -> np.ndarray:
        chosen: np.ndarray = np.argmin(error + price * cost, axis=1)
        return chosen

    def within(chosen: np.ndarray) -> bool:
        return float(np.take_along_axis(cost, chosen[:, None], 1).sum()) <= budget * (1 + 1e-12)

    if within(free := at(0.0)):
        return free
    # nobody pays for bits at this price
    high = 2 * float(np.ptp(error[np.isfinite(error)])) / float(np.diff(cost, axis=1).min())
    low = high * 1e-18
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if within(at(middle)) else (middle, high)
    return at(high)


def _fill(error: np.ndarray, cost: np.ndarray, chosen: np.ndarray, budget: float) -> np.ndarray:
    """Spend what the budget still holds, each time where it gains most per bit."""
    rows = np.arange(len(error))
    chosen, left = chosen.copy(), budget * (1 + 1e-12) - cost[rows, chosen].sum()
    while True:
        gain = error[rows, chosen][:, None] - error
        price = cost - cost[rows, chosen][:, None]
        useful = (gain > 0) & (price <= left)
        if not useful.any():
            return chosen
        ratio = np.where(useful, gain / np.where(useful, price, 1.0), -np.inf)
        row, choice = np.unravel_index(int(ratio.argmax()), ratio.shape)
        left -= price[row, choice]
        chosen[row] = choice


__all__ = ["allocate_channels", "channel_bits", "channel_importance", "channel_shares"]
