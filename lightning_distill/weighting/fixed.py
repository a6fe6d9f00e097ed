"""Constant weights of the loss terms."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_distill.weighting.weighting import Weighting


class FixedWeights(Weighting):
    """``sum(weight * loss)`` with constant weights.

    Args:
        weights: Weight of each term by name, not negative. The dictionary may be changed during training; a
            callback that turns weights writes here.

    Raises:
        ValueError: If a weight is negative or not a number.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            if not weight >= 0:  # also rejects NaN
                raise ValueError(f"The weight of the term {name!r} must not be negative, got {weight}.")
        self.values = dict(weights)

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of ``losses``; scalar."""
        parts = [losses[name] if weight == 1 else weight * losses[name] for name, weight in self.values.items()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def weights(self) -> dict[str, float]:
        """The present weight of each term."""
        return dict(self.values)
