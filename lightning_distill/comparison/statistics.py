"""Means, paired differences and what they show. Plain numbers in, plain numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

Verdict = Literal["control", "better", "worse", "no difference shown", "not tested", "diverged"]
NAN = math.nan


@dataclass(frozen=True)
class Interval:
    """Mean of a sample with its standard deviation and the confidence interval of the mean.

    Attributes:
        n: Number of values.
        mean: Their mean; NaN without values.
        sd: Standard deviation (``n - 1`` in the denominator); NaN for fewer than two values.
        low: Lower end of the interval; NaN for fewer than two values.
        high: Upper end.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedGain:
    """How much better a method is than its control on the same seeds; see :func:`paired_gain`.

    Attributes:
        pairs: Number of pairs.
        gain: Mean difference; NaN without pairs or where a value is not finite.
        low: Lower end of the confidence interval; NaN where there is no test.
        high: Upper end.
        t: Student's t with ``pairs - 1`` degrees of freedom; NaN where there is no test.
        p: Two-sided p-value, not corrected for the number of comparisons; NaN where there is no test.
        verdict: ``"better"`` or ``"worse"`` if the interval excludes 0, ``"no difference shown"`` if it contains it,
            ``"not tested"`` where there is no test, ``"diverged"`` where a value is not finite.
    """

    pairs: int
    gain: float
    low: float
    high: float
    t: float
    p: float
    verdict: Verdict


@dataclass(frozen=True)
class MethodSummary:
    """One line of the comparison.

    Attributes:
        method: Name.
        n: Number of seeds.
        mean: Mean of the metric over the seeds.
        sd: Standard deviation over the seeds.
        low: Lower end of the 95 % confidence interval of the mean.
        high: Upper end.
        gain: Mean paired gain over the control; positive is better, also for a metric that is minimized.
        gain_low: Lower end of its 95 % confidence interval.
        gain_high: Upper end.
        t: Student's t of the gain.
        p: Two-sided p-value of the gain, not corrected.
        p_holm: The same after Holm's correction for all the methods that were tested.
        pairs: Number of seeds that method and control have in common.
        verdict: See :class:`PairedGain`; ``"control"`` for the control.
        parameters: Trainable parameters of the student.
        steps: Mean number of optimizer steps.
        seconds: Mean wall-clock time of the training.
        cpu_seconds: Mean CPU time of the training.
    """

    method: str
    n: int
    mean: float
    sd: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    t: float
    p: float
    p_holm: float
    pairs: int
    verdict: Verdict
    parameters: int
    steps: float
    seconds: float
    cpu_seconds: float


def mean_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean of ``values`` with the confidence interval that Student's t gives.

    Args:
        values: Independent measurements.
        confidence: Coverage of the interval, in (0, 1).

    Returns:
        NaN where a number does not exist: everything if there are no values or one of them is not finite, all but
        the mean for one value.

    Example:
        >>> interval = mean_interval([1.0, 2.0, 3.0])
        >>> round(interval.low, 3), interval.mean, round(interval.high, 3)
        (-0.484, 2.0, 4.484)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be in (0, 1), got {confidence}.")
    sample = np.asarray(values, dtype=np.float64)
    n = len(sample)
    if n == 0 or not np.isfinite(sample).all():
        return Interval(n, NAN, NAN, NAN, NAN)
    mean = float(sample.mean())
    if n == 1:
        return Interval(1, mean, NAN, NAN, NAN)
    sd = float(sample.std(ddof=1))
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * sd / math.sqrt(n)
    return Interval(n, mean, sd, mean - half, mean + half)


def paired_gain(values: Sequence[float], control: Sequence[float], *, confidence: float = 0.95) -> PairedGain:
    r"""Paired t-test of ``values`` against ``control``; higher is better.

    .. math:: d_i = v_i - c_i, \quad t = \bar d \sqrt n / s_d, \quad p = 2 P(T_{n-1} > |t|)

    The test assumes that the differences are independent and roughly normal. There is no test of one pair, nor of
    differences that are all the same number other than 0, whose variance says nothing: both are ``"not tested"``.
    Differences that are all 0 give gain 0, t 0 and p 1.

    Args:
        values: The method's metric, one per seed.
        control: The control's metric for the same seeds, in the same order.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: If the lengths differ or ``confidence`` is outside (0, 1).

    Example:
        >>> found = paired_gain([0.95, 0.96, 0.94], [0.92, 0.94, 0.93])
        >>> round(found.gain, 3), round(found.t, 3), found.verdict
        (0.02, 3.464, 'no difference shown')
    """
    if len(values) != len(control):
        raise ValueError(
            f"`values` and `control` must have one number per seed each, got {len(values)} and {len(control)}."
        )
    n = len(values)
    if not np.isfinite([*values, *control]).all():
        return PairedGain(n, NAN, NAN, NAN, NAN, NAN, "diverged")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(control, dtype=np.float64)
    found = mean_interval(differences.tolist(), confidence=confidence)
    if n < 2:
        return PairedGain(n, found.mean, NAN, NAN, NAN, NAN, "not tested")
    if not differences.any():
        return PairedGain(n, 0.0, 0.0, 0.0, 0.0, 1.0, "no difference shown")
    # Equal differences of decimal fractions differ by rounding, and would give a t of 1e15.
    if found.sd <= 1e-12 * max(np.abs(values).max(), np.abs(control).max()):
        return PairedGain(n, found.mean, NAN, NAN, NAN, NAN, "not tested")
    t = found.mean * math.sqrt(n) / found.sd
    p = 2 * float(stdtr(n - 1, -abs(t)))
    verdict: Verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "no difference shown"
    return PairedGain(n, found.mean, found.low, found.high, t, p, verdict)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of ``p_values`` for their number; NaN (not tested) stays NaN and does not count.

    See Holm (1979), A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted = [NAN] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
