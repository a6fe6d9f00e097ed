"""How able a student has become, and what a pool makes of it. Pure functions, and an integral."""

from __future__ import annotations

import math


class StudentCapability:
    r"""The capability :math:`C(t) = C(0) + \int_0^t r`, by the trapezoid rule.

    Args:
        start: ``C(0)``, finite.
        rate: ``r`` at the time 0.

    Raises:
        ValueError: If a number is not finite.

    Example:
        >>> capability = StudentCapability(0.2, rate=0.0)
        >>> capability.update(0.1, 0.5)
        0.225
    """

    def __init__(self, start: float = 0.0, rate: float = 0.0) -> None:
        _require_finite(start=start, rate=rate)
        self.value = start
        self.rate = rate

    def update(self, rate: float, dt: float) -> float:
        """Go on by ``dt``, at whose end the rate is ``rate``.

        Args:
            rate: Growth per unit of time; negative where the student gets worse.
            dt: Time since the last call, not negative.

        Returns:
            The capability now.

        Raises:
            ValueError: If a number is outside its range.
        """
        _require_finite(rate=rate, dt=dt)
        if dt < 0:
            raise ValueError(f"`dt` must not be negative, got {dt}.")
        self.value += dt * (self.rate + rate) / 2
        self.rate = rate
        return self.value


def adaptive_threshold(capability: float, *, theta0: float, alpha: float) -> float:
    """Difficulty from which the large teacher is asked: ``theta0 * (1 + alpha * capability)``.

    It rises with the student, which then needs the large teacher for fewer samples.

    Args:
        capability: ``C``, finite.
        theta0: The threshold at the capability 0, not negative.
        alpha: Growth per unit of capability, not negative.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(adaptive_threshold(0.2, theta0=0.6, alpha=0.4), 3)
        0.648
    """
    _require_finite(capability=capability, theta0=theta0, alpha=alpha)
    _require_not_negative(theta0=theta0, alpha=alpha)
    return theta0 * (1 + alpha * capability)


def teacher_weight(capability: float, *, w0: float = 1.0, kappa: float = 1.0) -> float:
    """Weight of the large teacher, which falls as the student grows: ``w0 * exp(-kappa * capability)``.

    Args:
        capability: ``C``, finite.
        w0: The weight at the capability 0, not negative.
        kappa: Decay per unit of capability, not negative.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> teacher_weight(0.0, w0=0.7)
        0.7
    """
    _require_finite(capability=capability, w0=w0, kappa=kappa)
    _require_not_negative(w0=w0, kappa=kappa)
    return w0 * math.exp(-kappa * capability)


def _require_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, got {value}.")


def _require_not_negative(**values: float) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
