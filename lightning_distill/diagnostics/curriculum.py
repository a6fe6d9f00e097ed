"""Whether an order of the samples helped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.estimates import Estimate
from lightning_distill.diagnostics.observations import float64


@dataclass(frozen=True)
class CurriculumBenefit:
    """How much smaller the error is with a curriculum than in random order.

    Attributes:
        benefit: Error in random order minus error with the curriculum at each time, with intervals over seeds.
        p_values: Of the two-sided paired t-test at each time; 1 where there is no difference at all.
        slope: Slope of the logarithm of the mean benefit's size over the logarithm of time; NaN where it is not
            defined. The chapter's claim is -1/2.
    """

    benefit: list[Estimate]
    p_values: list[float]
    slope: float


def curriculum_benefit(
    errors_curriculum: Tensor, errors_random: Tensor, times: Sequence[float], *, confidence: float = 0.95
) -> CurriculumBenefit:
    """Compare error curves of a curriculum and of random order, seed by seed.

    Args:
        errors_curriculum: Shape ``(seeds, times)``, at least two seeds.
        errors_random: The same, for the same seeds.
        times: Optimizer steps or epochs at which the errors were measured, positive, ascending.
        confidence: Of the intervals (t distribution), between 0 and 1.

    Raises:
        ValueError: If the shapes do not fit, or there is one seed only.
    """
    from scipy import stats

    first, second = float64(errors_curriculum), float64(errors_random)
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] != len(times):
        raise ValueError(
            f"Both errors must have the shape (seeds, {len(times)} times), got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
    if len(first) < 2:
        raise ValueError("A paired comparison needs at least two seeds, got 1.")
    differences = second - first
    estimates, p_values = [], []
    for column in differences.T:
        mean, error = column.mean().item(), column.std().item() / math.sqrt(len(column))
        if error == 0:
            estimates.append(Estimate(mean, mean, mean, len(column)))
            p_values.append(1.0 if mean == 0 else 0.0)
            continue
        half = stats.t.ppf((1 + confidence) / 2, len(column) - 1) * error
        estimates.append(Estimate(mean, mean - half, mean + half, len(column)))
        p_values.append(float(2 * stats.t.sf(abs(mean / error), len(column) - 1)))
    return CurriculumBenefit(estimates, p_values, _slope(differences.mean(dim=0).abs(), times))


def _slope(sizes: Tensor, times: Sequence[float]) -> float:
    """Least-squares slope of log size over log time, over the times with a size."""
    kept = sizes > 0
    if int(kept.sum()) < 2:
        return math.nan
    x, y = torch.tensor([*map(float, times)], dtype=torch.float64)[kept].log(), sizes[kept].log()
    x = x - x.mean()
    return float((x @ y) / (x @ x))
