"""Whether minimising by turns kept its promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MonotonicityReport:
    """Where a loss grew from one phase to the next.

    Attributes:
        violations: The phases, counted from 0, that ended higher than the one before.
        largest_increase: The largest of those increases; 0 without one.
        total_decrease: The first loss minus the last one.
    """

    violations: tuple[int, ...]
    largest_increase: float
    total_decrease: float

    @property
    def is_monotone(self) -> bool:
        """Whether no phase ended higher than the one before."""
        return not self.violations


def monotonicity_report(losses: Sequence[float], *, tolerance: float = 0.0) -> MonotonicityReport:
    """Look for phases of an alternation that made the loss larger.

    Minimising over weights and over quantizers by turns never makes the loss larger only if each half is exact, or at
    least never ascends, on the same deterministic loss (Tseng 2001,
    https://doi.org/10.1023/A:1017501703105). With mini-batches, or gradients that are passed straight through a
    rounding, nothing is promised: measure the loss after each phase on the same data.

    Args:
        losses: After each phase, in order; at least one.
        tolerance: Increases up to this are none; at least 0.

    Raises:
        ValueError: If there are no losses, one is NaN, or ``tolerance`` is negative.

    Example:
        >>> monotonicity_report([1.0, 0.5, 0.6, 0.2]).violations
        (2,)
    """
    if not losses or any(math.isnan(loss) for loss in losses):
        raise ValueError(f"`losses` must be at least one number and none NaN, got {list(losses)}.")
    if not tolerance >= 0:
        raise ValueError(f"`tolerance` must be at least 0, got {tolerance}.")
    increases = [after - before for before, after in itertools.pairwise(losses)]
    violations = tuple(phase for phase, increase in enumerate(increases, start=1) if increase > tolerance)
    return MonotonicityReport(violations, max([0.0, *(increases[v - 1] for v in violations)]), losses[0] - losses[-1])
