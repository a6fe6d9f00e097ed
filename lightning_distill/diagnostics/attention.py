"""Where the layers of a network look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.layer_profile import LayerProfile, layer_profile
from lightning_distill.diagnostics.observations import float64


@dataclass(frozen=True)
class AttentionProfile:
    """Where the layers of a network look.

    Attributes:
        distance: Mean distance between a query and what it attends to, positions.
        entropy: Mean entropy of a query's attention, nats.
    """

    distance: LayerProfile
    entropy: LayerProfile


@torch.no_grad()
def attention_distance_profile(attentions: Sequence[Tensor], mask: Tensor | None = None) -> AttentionProfile:
    """Mean attention distance ``sum_j A_ij |i - j|`` and entropy of each layer, over heads, queries and samples.

    Whether shallow layers look near and deep ones far is what ``distance.trend.verdict()`` answers for this network.

    Args:
        attentions: Maps of each layer, ``(B, heads, T, T)``.
        mask: Which queries count, boolean, ``(B, T)``; by default all.

    Raises:
        ValueError: If there are no layers, or a map has another shape.
    """
    if len(attentions) == 0:
        raise ValueError("`attentions` must hold the maps of at least one layer, got none.")
    distances: list[Tensor] = []
    entropies: list[Tensor] = []
    for attention in attentions:
        if attention.ndim != 4 or attention.shape[2] != attention.shape[3]:
            raise ValueError(f"Attention maps must have shape (B, heads, T, T), got {tuple(attention.shape)}.")
        weights = float64(attention)
        position = torch.arange(weights.shape[-1], dtype=torch.float64)
        gap = (position.unsqueeze(1) - position).abs()
        for found, values in (
            (distances, (weights * gap).sum(dim=-1)),
            (entropies, torch.special.entr(weights).sum(dim=-1)),
        ):
            found.append(_mean_per_sample(values.mean(dim=1), mask))
    return AttentionProfile(layer_profile(torch.stack(distances)), layer_profile(torch.stack(entropies)))


def _mean_per_sample(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the queries that count of each sample that has any."""
    if mask is None:
        return values.mean(dim=1)
    keep = mask.detach().cpu().bool()
    some = keep.any(dim=1)
    return (values.where(keep, 0).sum(dim=1) / keep.sum(dim=1).clamp_min(1))[some]
