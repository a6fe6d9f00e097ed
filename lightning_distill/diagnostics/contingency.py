"""Mutual information of two discrete quantities."""

from __future__ import annotations

import torch
from torch import Tensor


def contingency_table(rows: Tensor, columns: Tensor, classes: int) -> Tensor:
    """Contingency table, shape ``(classes, number of columns)``."""
    width = int(columns.max()) + 1
    return torch.bincount(rows * width + columns, minlength=classes * width).reshape(classes, width).double()


def mutual_information(joint: Tensor) -> float:
    """Mutual information of the two indices of a probability table, nats."""
    independent = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / independent).log(), 0).sum().item()


def miller_madow_bias(counts: Tensor) -> float:
    """What the plug-in mutual information of a table of counts is corrected by (Miller 1955)."""
    rows, columns, cells = (int((c > 0).sum()) for c in (counts.sum(dim=1), counts.sum(dim=0), counts))
    return (rows + columns - cells - 1) / (2 * counts.sum().item())
