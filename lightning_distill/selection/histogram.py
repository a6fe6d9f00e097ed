"""Quantiles of entropies that come in over many steps, from counts that add up over micro-batches and processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 512
LOWEST = 1e-6
HIGHEST = 14.0
"""Nats: more than the entropy of any prediction over a million classes, log(10**6) = 13.8."""
_WIDTH = math.log(HIGHEST / LOWEST) / BINS


def count_entropies(entropy: Tensor, rows: Tensor | None = None, num_rows: int = 1) -> Tensor:
    """How many of the entropies are in each of :data:`BINS` bins, row by row.

    The bins divide 1e-6 to 14 nats in equal ratios (3.3 % each): where a network is sure, almost all entropies are
    close to 0, and bins of equal width would not tell them apart. Lower values are in the first bin, higher ones in
    the last.

    Args:
        entropy: Nats, any shape.
        rows: Row in which each is counted, same shape, in ``[0, num_rows)``; ``None`` for a single row.
        num_rows: Number of rows.

    Returns:
        Shape ``(num_rows, BINS)``, or ``(BINS,)`` without ``rows``; float64.
    """
    place = (entropy.flatten().double().clamp_min(LOWEST) / LOWEST).log() / _WIDTH
    index = place.floor().clamp(0, BINS - 1).long()
    if rows is None:
        return torch.bincount(index, minlength=BINS).double()
    return torch.bincount(rows.flatten() * BINS + index, minlength=num_rows * BINS).double().view(num_rows, BINS)


def histogram_quantile(counts: Tensor, q: float) -> Tensor:
    """The value that ``q`` percent of the counted entropies do not exceed, within the width of a bin.

    Args:
        counts: Shape ``(..., BINS)``; need not be integers.
        q: In [0, 100].

    Returns:
        Shape ``(...)``, float64; minus infinity where nothing was counted, or nothing is below.
    """
    cumulative = counts.cumsum(dim=-1)
    total = cumulative[..., -1:]
    wanted = total * q / 100
    index = torch.searchsorted(cumulative, wanted).clamp_max(BINS - 1)
    in_bin = counts.gather(-1, index)
    before = cumulative.gather(-1, index) - in_bin
    fraction = ((wanted - before) / in_bin.clamp_min(1e-300)).clamp(0, 1)
    value = LOWEST * ((index + fraction) * _WIDTH).exp()
    nothing = (total <= 0) | (wanted <= 0)
    return torch.where(nothing, -math.inf, value).squeeze(-1)
