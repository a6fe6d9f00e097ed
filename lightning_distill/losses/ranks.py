"""What processes that train together tell each other within a loss."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """Number of processes that train together; 1 where there is no process group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over all processes, without a graph; ``values`` itself for one process."""
    values = values.detach()
    if world_size() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total


def gather_rows(values: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, in the order of their ranks, without a graph.

    Processes may have different numbers of rows.

    Args:
        values: Shape ``(n, ...)``, the same but for ``n`` in all processes.

    Returns:
        Shape ``(sum of n, ...)``, and where the rows of this process begin.
    """
    values = values.detach()
    if world_size() == 1:
        return values, 0
    size = torch.tensor([len(values)], device=values.device)
    sizes = [torch.empty_like(size) for _ in range(world_size())]
    distributed.all_gather(sizes, size)
    counts = [int(count) for count in torch.cat(sizes)]
    padded = values.new_zeros(max(counts), *values.shape[1:])  # a collective needs equal shapes
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return rows, sum(counts[: distributed.get_rank()])
