"""An order of samples whose batches hold texts of like length."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 50
"""Batches within which samples are sorted by length."""


def bucketed(order: Tensor, lengths: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """Rearrange ``order`` such that the samples of a batch have like lengths, and little is padded.

    Within windows of 50 batches the samples are sorted by length and cut into batches, whose order is then drawn anew.
    Every sample stays once; a smaller batch stays at the end.

    Args:
        order: Indices of samples, shape ``(n,)``, in random order.
        lengths: Of all samples.
        batch_size: Samples per batch, over all ranks.
        generator: Of the order of the batches.

    Returns:
        Shape ``(n,)``.

    Example:
        >>> lengths = torch.tensor([9, 1, 8, 2])
        >>> sorted(bucketed(torch.arange(4), lengths, 2, torch.Generator().manual_seed(0)).view(2, 2).tolist())
        [[1, 3], [2, 0]]
    """
    whole = len(order) // batch_size * batch_size
    batches: list[Tensor] = []
    for window in order[:whole].split(WINDOW * batch_size):
        ascending = window[lengths[window].argsort(stable=True)]
        batches.extend(ascending.view(-1, batch_size))
    if not batches:
        return order
    shuffled = torch.stack(batches)[torch.randperm(len(batches), generator=generator)]
    return torch.cat([shuffled.flatten(), order[whole:]])
