"""A weight over the training: warm-up, plateau, decay."""

from __future__ import annotations

import math
from dataclasses import dataclass


def staged_weight(
    step: float,
    *,
    initial: float = 0.0,
    middle: float = 1.0,
    warm_up: float,
    hold_until: float | None = None,
    decay: float = 0.0,
) -> float:
    r"""Weight of a term at ``step``: half a cosine from ``initial`` to ``middle``, constant, exponential decay.

    .. math:: w_0 + (w_m - w_0) \frac{1 - \cos(\pi t / T_1)}{2} \;\; (t < T_1), \qquad
              w_m \;\; (t < T_2), \qquad w_m e^{-\gamma (t - T_2)}

    Args:
        step: Optimizer steps done, ``t >= 0``.
        initial: Weight at the start, not negative.
        middle: Weight from ``warm_up`` to ``hold_until``, not negative. Below ``initial`` the first stage lowers it.
        warm_up: Length of the first stage in optimizer steps, ``T_1 >= 0``.
        hold_until: Where the decay begins, ``T_2 >= T_1``; ``None`` for never.
        decay: Rate per step, not negative.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> [round(staged_weight(step, middle=0.8, warm_up=100), 3) for step in (0, 50, 100, 500)]
        [0.0, 0.4, 0.8, 0.8]
    """
    for name, value in {"step": step, "initial": initial, "middle": middle, "warm_up": warm_up, "decay": decay}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
    if hold_until is not None and not hold_until >= warm_up:
        raise ValueError(f"`hold_until` must not lie before the end of `warm_up`, {warm_up}, got {hold_until}.")
    if step < warm_up:
        return initial + (middle - initial) * (1 - math.cos(math.pi * step / warm_up)) / 2
    if hold_until is None or step < hold_until:
        return middle
    return middle * math.exp(-decay * (step - hold_until))


@dataclass(frozen=True)
class StagedWeight:
    """:func:`staged_weight` as a function of the optimizer step, for ``ScheduledWeights``.

    Attributes:
        warm_up: Length of the first stage in optimizer steps, not negative.
        middle: Weight of the second stage, not negative.
        initial: Weight at the start, not negative.
        hold_until: Where the third stage begins; ``None`` for never.
        decay: Its rate per step, not negative.

    Raises:
        ValueError: If an attribute is outside its range.

    Example:
        >>> StagedWeight(warm_up=10)(10)
        1.0
    """

    warm_up: float
    middle: float = 1.0
    initial: float = 0.0
    hold_until: float | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        self(0)  # checks the values

    def __call__(self, step: float) -> float:
        """Weight at ``step``."""
        return staged_weight(
            step,
            initial=self.initial,
            middle=self.middle,
            warm_up=self.warm_up,
            hold_until=self.hold_until,
            decay=self.decay,
        )
