"""A quantity at each layer of a network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.estimates import Estimate, bootstrap_mean
from lightning_distill.diagnostics.observations import fixed_generator


@dataclass(frozen=True)
class LayerProfile:
    """A quantity measured at each layer.

    Attributes:
        layers: One estimate per layer, from the shallowest.
        trend: Spearman's rank correlation of layer and quantity, with its bootstrap interval over the observations;
            0, undecided, for fewer than three layers.
    """

    layers: tuple[Estimate, ...]
    trend: Estimate

    @property
    def best(self) -> int:
        """Index of the layer with the largest value; the shallowest of equal ones."""
        values = [estimate.value for estimate in self.layers]
        return values.index(max(values))


def layer_profile(values: Tensor) -> LayerProfile:
    """Estimates and trend of values ``(layers, observations)``."""
    layers = tuple(bootstrap_mean(row) for row in values)
    number, n = values.shape
    if number < 3:
        return LayerProfile(layers, Estimate(0.0, -math.inf, math.inf, n))
    value = _spearman(values.mean(dim=1)).item()
    if n == 1:
        return LayerProfile(layers, Estimate(value, -math.inf, math.inf, n))
    generator = fixed_generator(None)
    again = torch.stack(
        [_spearman(values[:, torch.randint(n, (n,), generator=generator)].mean(dim=1)) for _ in range(500)]
    )
    low, high = again.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return LayerProfile(layers, Estimate(value, low, high, n))


def _spearman(values: Tensor) -> Tensor:
    """Rank correlation with the index; equal values share their mean rank."""
    below = (values.unsqueeze(1) > values).sum(dim=1)
    ranks = (below + (values.unsqueeze(1) >= values).sum(dim=1)).double() / 2
    index = torch.arange(len(values), dtype=torch.float64)
    x, y = index - index.mean(), ranks - ranks.mean()
    scale = x.norm() * y.norm()
    return (x @ y) / scale if scale > 0 else torch.zeros((), dtype=torch.float64)
