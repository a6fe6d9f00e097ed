"""A measured quantity with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.diagnostics.observations import fixed_generator, float64

Verdict = Literal["supported", "refuted", "undecided"]


@dataclass(frozen=True)
class Estimate:
    """A measured quantity.

    Attributes:
        value: The estimate.
        low: Lower end of its confidence interval; minus infinity where there is nothing to estimate it from.
        high: Upper end.
        n: Number of observations behind it.
    """

    value: float
    low: float
    high: float
    n: int

    def verdict(self, threshold: float = 0.0) -> Verdict:
        """Whether the claim that the quantity is above ``threshold`` is supported: the whole interval decides."""
        if self.low > threshold:
            return "supported"
        return "refuted" if self.high < threshold else "undecided"


def bootstrap_mean(
    values: Tensor | Sequence[float],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Mean of ``values`` with a percentile bootstrap interval (Efron 1979).

    The interval is too narrow for a handful of values; a single one has none, and its ends are infinite.

    Args:
        values: Independent observations, shape ``(n,)``, ``n >= 1``.
        resamples: Number of bootstrap samples, positive.
        confidence: Coverage of the interval, between 0 and 1, both excluded.
        generator: Source of randomness; by default one with a fixed seed, so that the same values give the same
            interval.

    Raises:
        ValueError: If there are no values, one is not finite, or an argument is outside its range.

    Example:
        >>> bootstrap_mean([1.0, 1.0, 1.0])
        Estimate(value=1.0, low=1.0, high=1.0, n=3)
    """
    observations = float64(torch.as_tensor(values, dtype=torch.float64)).flatten()
    if observations.numel() == 0 or not bool(observations.isfinite().all()):
        raise ValueError(f"`values` must be one or more finite numbers, got {observations.tolist()[:5]}.")
    if not resamples >= 1:
        raise ValueError(f"`resamples` must be positive, got {resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    n, value = observations.numel(), observations.mean().item()
    if n == 1:
        return Estimate(value, -math.inf, math.inf, 1)
    generator = fixed_generator(generator)
    means = torch.stack(
        [observations[torch.randint(n, (n,), generator=generator)].mean() for _ in range(resamples)]
    )  # one at a time: an index matrix of all samples would not fit for large n
    ends = means.quantile(torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64))
    return Estimate(value, ends[0].item(), ends[1].item(), n)
