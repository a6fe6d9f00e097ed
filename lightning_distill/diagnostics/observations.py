"""What every diagnostic does to its input first."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.outputs import UNLABELLED


def float64(values: Tensor) -> Tensor:
    """``values`` on the CPU in float64, without a graph."""
    return values.detach().cpu().double()


def fixed_generator(generator: torch.Generator | None) -> torch.Generator:
    """``generator``, or one with a fixed seed, so that the same input gives the same result."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def labelled(name: str, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``(n, C)`` and labels ``(n,)`` of the labelled items."""
    if values.ndim < 1 or labels.shape != values.shape[:-1]:
        raise ValueError(
            f"`labels` must have the shape of the items of `{name}`, {tuple(values.shape[:-1])}, got "
            f"{tuple(labels.shape)}."
        )
    rows, y = float64(values).reshape(-1, values.shape[-1]), labels.detach().cpu().long().reshape(-1)
    rows, y = rows[y != UNLABELLED], y[y != UNLABELLED]
    if len(y) == 0:
        raise ValueError(f"`labels` must label at least one item, but all are {UNLABELLED}.")
    if int(y.min()) < 0 or int(y.max()) >= rows.shape[1]:
        raise ValueError(f"`labels` must be in [0, {rows.shape[1]}), got {int(y.min())} to {int(y.max())}.")
    return rows, y
