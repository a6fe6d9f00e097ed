"""What a search for weights found."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Objective = Callable[[Mapping[str, float]], float]
"""Validation loss, to be minimised, of a training with the given weights of the terms."""


@dataclass
class WeightSearch:
    """Weights that were tried and what came of them.

    Attributes:
        tried: Weights and validation loss, in the order of the trials.
        preferred: The weights that a policy came to choose most often; ``None`` for searches without one.
    """

    tried: list[tuple[dict[str, float], float]] = field(default_factory=list)
    preferred: dict[str, float] | None = None

    @property
    def best(self) -> dict[str, float]:
        """The weights with the lowest validation loss, the first of them if there are several.

        Raises:
            ValueError: If no loss was finite.
        """
        return min(self._finite(), key=lambda trial: trial[1])[0]

    @property
    def value(self) -> float:
        """The lowest validation loss.

        Raises:
            ValueError: If no loss was finite.
        """
        return min(loss for _, loss in self._finite())

    @property
    def best_so_far(self) -> list[float]:
        """The lowest validation loss after each trial; infinity before the first finite one."""
        lowest, values = math.inf, []
        for _, loss in self.tried:
            lowest = min(lowest, loss) if math.isfinite(loss) else lowest
            values.append(lowest)
        return values

    def note(self, weights: Mapping[str, float], loss: float) -> float:
        """Add a trial; a loss that is not finite counts as infinite."""
        loss = float(loss) if math.isfinite(loss) else math.inf
        self.tried.append((dict(weights), loss))
        return loss

    def _finite(self) -> list[tuple[dict[str, float], float]]:
        finite = [trial for trial in self.tried if math.isfinite(trial[1])]
        if not finite:
            raise ValueError(f"None of the {len(self.tried)} trials gave a finite validation loss.")
        return finite


def require_weights(initial: Mapping[str, float]) -> None:
    """Refuse weights that have no logarithm.

    Raises:
        ValueError: If there are none, or one is not positive.
    """
    if not initial:
        raise ValueError("`initial` is empty; give the weights to start from by term name.")
    for name, weight in initial.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"`initial[{name!r}]` must be positive, the search is in its logarithm; got {weight}.")
