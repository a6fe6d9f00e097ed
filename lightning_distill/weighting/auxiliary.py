"""Weights of auxiliary heads: over the training, and by how well a head does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_distill.outputs import Step


def linear_decay(progress: float, *, alpha: float = 1.0) -> float:
    """``1 - alpha * progress``: factor of the auxiliary weights that falls to ``1 - alpha`` at the end of the training.

    Args:
        progress: Fraction of the training done, in [0, 1].
        alpha: What is lost by the end, in [0, 1]; with more the weights would become negative.

    Raises:
        ValueError: If ``progress`` or ``alpha`` is outside [0, 1].

    Example:
        >>> linear_decay(0.5, alpha=0.9)
        0.55
    """
    _check_share("progress", progress)
    _check_share("alpha", alpha)
    return 1.0 - alpha * progress


def exponential_decay(progress: float, *, beta: float = 3.0) -> float:
    """``exp(-beta * progress)``: factor of the auxiliary weights that falls fast at first and never reaches 0.

    With ``beta = alpha`` it is *above* the linear decay everywhere (``exp(-x) >= 1 - x``); to end where that does,
    ``beta`` must be ``-log(1 - alpha)``, which is 2.3 for ``alpha = 0.9``.

    Args:
        progress: Fraction of the training done, in [0, 1].
        beta: Rate, not negative.

    Raises:
        ValueError: If ``progress`` is outside [0, 1], or ``beta`` is negative or not finite.

    Example:
        >>> round(exponential_decay(1.0), 4)
        0.0498
    """
    _check_share("progress", progress)
    if not 0 <= beta < math.inf:
        raise ValueError(f"`beta` must be finite and not negative, got {beta}.")
    return math.exp(-beta * progress)


def performance_weights(
    main_accuracy: float,
    head_accuracies: Sequence[float],
    *,
    invert: bool = False,
    max_ratio: float = 5.0,
) -> list[float]:
    """Factors of the auxiliary weights from the accuracies: ``main / head``, or ``head / main`` with ``invert``.

    The plain ratio is at least 1 while the main classifier is ahead and tends to 1: heads that lag behind get *more*
    weight. ``invert`` trusts a head as far as it has come, and gives less. Both are 1 for equal accuracies.

    Args:
        main_accuracy: Of the main classifier, in [0, 1].
        head_accuracies: Of each auxiliary head, in [0, 1].
        invert: Whether weak heads get less weight instead of more.
        max_ratio: The factors are kept between ``1 / max_ratio`` and ``max_ratio``; at least 1.

    Returns:
        One factor per head; 1 where neither has got anything right yet.

    Raises:
        ValueError: If an accuracy is outside [0, 1] or ``max_ratio`` is below 1.

    Example:
        >>> performance_weights(0.9, [0.45, 0.9])
        [2.0, 1.0]
    """
    _check_share("main_accuracy", main_accuracy)
    if not 1 <= max_ratio < math.inf:
        raise ValueError(f"`max_ratio` must be at least 1 and finite, got {max_ratio}.")
    factors = []
    for accuracy in head_accuracies:
        _check_share("head_accuracies", accuracy)
        above, below = (accuracy, main_accuracy) if invert else (main_accuracy, accuracy)
        ratio = 1.0 if above == below else above / below if below > 0 else math.inf
        factors.append(min(max(ratio, 1 / max_ratio), max_ratio))
    return factors


@dataclass(frozen=True)
class LinearDecay:
    """:func:`linear_decay` as a rule of the step.

    Args:
        alpha: What is lost by the end of the training, in [0, 1].
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        linear_decay(0.0, alpha=self.alpha)  # checks the value

    def __call__(self, step: Step) -> float:
        """The factor at this step."""
        return linear_decay(step.progress, alpha=self.alpha)


@dataclass(frozen=True)
class ExponentialDecay:
    """:func:`exponential_decay` as a rule of the step.

    Args:
        beta: Rate, not negative.
    """

    beta: float = 3.0

    def __post_init__(self) -> None:
        exponential_decay(0.0, beta=self.beta)  # checks the value

    def __call__(self, step: Step) -> float:
        """The factor at this step."""
        return exponential_decay(step.progress, beta=self.beta)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:  # also rejects NaN
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")
