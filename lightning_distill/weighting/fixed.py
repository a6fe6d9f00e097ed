"""Constant weights of the loss terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_distill.weighting.weighting import Weighting


class FixedWeights(Weighting):
    """``sum(weight * loss)`` with constant weights.

    Terms that are not there in a step are left out.

    Args:
        weights: Weight of each term by name, not negative. The dictionary may be changed during training; a
            callback that turns weights writes here.

    Raises:
        ValueError: If a weight is negative or not a number.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        for name, weight in weights.items():
            check_weight(name, weight)
        self.values = dict(weights)

    def bind(self, terms: Sequence[str], student: nn.Module) -> None:
        """Refuse weights that do not fit the terms."""
        check_weights_fit(self.values, terms)

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of ``losses``; scalar.

        Raises:
            ValueError: If there are no losses, or one has no weight.
        """
        parts = [
            losses[name] if weight == 1 else weight * losses[name]
            for name, weight in self.values.items()
            if name in losses
        ]
        if not parts or len(parts) != len(losses):
            raise ValueError(
                f"There are weights for the terms {list(self.values)}, but losses of {list(losses)}. A term that comes "
                "later needs a weight from the start: `module.weighting.values[name] = 1.0`."
            )
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def weights(self) -> dict[str, float]:
        """The present weight of each term."""
        return dict(self.values)


def check_weight(name: str, weight: float) -> None:
    """Refuse a weight that is negative or not a number.

    Raises:
        ValueError: If it is.
    """
    if not weight >= 0:  # also rejects NaN
        raise ValueError(f"The weight of the term {name!r} must not be negative, got {weight}.")


def check_weights_fit(weights: Mapping[str, object], terms: Sequence[str]) -> None:
    """Refuse weights for unknown terms, and terms without a weight.

    Raises:
        ValueError: If there are such.
    """
    if unknown := [name for name in weights if name not in terms]:
        raise ValueError(f"`weights` names {unknown}, which are no terms; there are {list(terms)}.")
    if missing := [name for name in terms if name not in weights]:
        raise ValueError(f"`weights` has no weight for {missing}; give each term one: {dict.fromkeys(terms, 1.0)}.")
