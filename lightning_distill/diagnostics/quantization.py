"""Errors of quantized networks: whether the usual models of them hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar, nnls
from torch import Tensor

from lightning_distill.diagnostics.estimates import Estimate
from lightning_distill.diagnostics.observations import fixed_generator, float64


@dataclass(frozen=True)
class QuantizationError:
    r"""The error :math:`e = w - Q(w)` of a quantizer, beside what uniform noise of its step :math:`\Delta` would give.

    Attributes:
        mean: Of the error.
        variance: Of the error.
        uniform_variance: :math:`\Delta^2 / 12`, mean over all values.
        uniform_variance_of_square: :math:`\Delta^4 / 180`, mean over all values.
        sqnr_db: Signal to noise, :math:`10 \log_{10} \sum w^2 / \sum e^2`, in decibels; infinite without an error.
        distance: Largest difference between the distribution functions of :math:`e / \Delta` and of uniform noise
            (Kolmogorov and Smirnov), in [0, 1].
        clipped: Share of the values whose error is larger than half a step: those outside the range.
        n: Number of values.
    """

    mean: float
    variance: float
    uniform_variance: float
    uniform_variance_of_square: float
    sqnr_db: float
    distance: float
    clipped: float
    n: int


def quantization_error(values: Tensor, quantized: Tensor, step: Tensor | float) -> QuantizationError:
    """Hold the errors of a quantizer against the model of uniform noise (Bennett 1948; Widrow 1956).

    The model is good for steps that are small against the values' spread, without clipping: for weights from about 4
    bits on.

    Args:
        values: Before quantization, any shape, at least one value.
        quantized: After it, same shape.
        step: Distance of two neighbouring levels, positive: a number, or a tensor that broadcasts to ``values``.

    Raises:
        ValueError: If the shapes differ, there is no value, or a step is not positive.

    Example:
        >>> w = torch.linspace(-1, 1, 2001)
        >>> found = quantization_error(w, (w / 0.125).round() * 0.125, 0.125)
        >>> round(found.variance / found.uniform_variance, 2), found.clipped
        (1.0, 0.0)
    """
    if values.shape != quantized.shape or values.numel() == 0:
        raise ValueError(
            f"`values` and `quantized` must have the same shape and not be empty, got {tuple(values.shape)} and "
            f"{tuple(quantized.shape)}."
        )
    w, delta = float64(values), float64(torch.as_tensor(step, dtype=torch.float64))
    if not bool((delta > 0).all()):
        raise ValueError(f"`step` must be positive, got {delta.min().item():g}.")
    error = w - float64(quantized)
    delta = delta.expand_as(error)
    relative = (error / delta).flatten()
    noise, signal = error.square().sum().item(), w.square().sum().item()
    place = relative.sort().values.clamp(-0.5, 0.5) + 0.5
    count = len(place)
    upper = torch.arange(1, count + 1, dtype=torch.float64) / count
    return QuantizationError(
        mean=error.mean().item(),
        variance=error.var(unbiased=False).item(),
        uniform_variance=(delta.square() / 12).mean().item(),
        uniform_variance_of_square=(delta.pow(4) / 180).mean().item(),
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf,
        distance=torch.maximum(upper - place, place - upper + 1 / count).max().item(),
        clipped=(relative.abs() > 0.5 + 1e-6).double().mean().item(),
        n=count,
    )


@dataclass(frozen=True)
class JointError:
    r"""How the errors of quantization and of distillation add up.

    Attributes:
        quantization: Mean squared error of quantization.
        distillation: Mean squared error of distillation.
        total: Mean square of their sum.
        gamma: :math:`(E_{tot} - E_q - E_d) / \sqrt{E_q E_d}`, in [-2, 2]: twice the cosine between the two errors. 0
            where they have nothing to do with each other; below 0 they cancel in part. NaN where one of them is zero.
    """

    quantization: float
    distillation: float
    total: float
    gamma: float


def joint_error(quantization: Tensor, distillation: Tensor) -> JointError:
    """Measure how two errors of the same outputs add up.

    A bound ``E_q + E_d + gamma * sqrt(E_q * E_d)`` holds with 2 for any two errors (Cauchy and Schwarz); what says
    something is the measured factor.

    Args:
        quantization: Quantized student's outputs minus the student's own, any shape.
        distillation: The student's outputs minus the teacher's, same shape.

    Raises:
        ValueError: If the shapes differ or there is no value.

    Example:
        >>> e = torch.tensor([1.0, -1.0])
        >>> joint_error(e, e).gamma, joint_error(e, -e).total
        (2.0, 0.0)
    """
    if quantization.shape != distillation.shape or quantization.numel() == 0:
        raise ValueError(
            "`quantization` and `distillation` must have the same shape and not be empty, got "
            f"{tuple(quantization.shape)} and {tuple(distillation.shape)}."
        )
    e_q, e_d = float64(quantization).flatten(), float64(distillation).flatten()
    first, second, total = (e.square().mean().item() for e in (e_q, e_d, e_q + e_d))
    scale = math.sqrt(first * second)
    gamma = 2 * (e_q * e_d).mean().item() / scale if scale > 0 else math.nan
    return JointError(first, second, total, gamma)


@dataclass(frozen=True)
class RecoveryBound:
    r"""A fit of :math:`a \, 2^{-c b} + d / \sqrt{n}` to the accuracy that quantization costs.

    Attributes:
        a: Not negative.
        c: With a bootstrap interval. 2 for a loss that grows with the squared error, 1 for one that grows with its
            size; NaN where no gap depends on the bits.
        d: Not negative.
        residual: Root of the mean squared residual.
    """

    a: float
    c: Estimate
    d: float
    residual: float


def recovery_bound_fit(
    gaps: Sequence[float],
    bits: Sequence[float],
    n: Sequence[float],
    *,
    resamples: int = 200,
    confidence: float = 0.95,
    generator: torch.Generator | None = None,
) -> RecoveryBound:
    r"""Fit the constants of :math:`|A_{rec} - A_{orig}| \le a \, 2^{-c b} + d / \sqrt{n}`, by least squares.

    An order of magnitude says nothing about a given network: the constants have to be measured. With one ``n`` for all
    observations the second part is a floor that does not depend on the bits.

    Args:
        gaps: Accuracy before quantization minus accuracy after it and recovery, one per run; three or more. Absolute
            values count.
        bits: Of each run.
        n: Number of training samples of each run, positive.
        resamples: Bootstrap samples of the interval of ``c``, positive.
        confidence: Coverage of the interval, between 0 and 1.
        generator: Source of randomness; by default one with a fixed seed.

    Raises:
        ValueError: If the lengths differ, there are fewer than three runs or two numbers of bits, or a number is
            outside its range.

    Example:
        >>> bits = [2, 3, 4, 5, 6, 8]
        >>> fit = recovery_bound_fit([3 * 4.0**-b + 0.01 for b in bits], bits, [10_000] * 6)
        >>> round(fit.a, 3), round(fit.c.value, 3), round(fit.d, 3)
        (3.0, 2.0, 1.0)
    """
    if not len(gaps) == len(bits) == len(n) or len(gaps) < 3 or len(set(bits)) < 2:
        raise ValueError(
            "`gaps`, `bits` and `n` must have one number for each of three or more runs, with two or more numbers of "
            f"bits, got {len(gaps)}, {len(bits)} and {len(n)} numbers, and bits {sorted(set(bits))}."
        )
    if not (all(map(math.isfinite, (*gaps, *bits))) and all(size >= 1 for size in n)):
        raise ValueError("`gaps` and `bits` must be finite, and `n` positive.")
    if not resamples >= 1:
        raise ValueError(f"`resamples` must be positive, got {resamples}.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}.")
    table = np.stack([np.abs(gaps), np.asarray(bits, float), 1 / np.sqrt(np.asarray(n, float))])
    a, c, d, residual = _fit(table)
    source = fixed_generator(generator)
    rates = []
    for _ in range(resamples):
        rows = torch.randint(len(gaps), (len(gaps),), generator=source).numpy()
        found = _fit(table[:, rows]) if len(set(table[1, rows])) >= 2 else (0.0, math.nan, 0.0, 0.0)
        rates.append(found[1])
    known = np.array(rates)[~np.isnan(rates)]
    low, high = (
        (-math.inf, math.inf) if len(known) == 0 else np.quantile(known, [(1 - confidence) / 2, (1 + confidence) / 2])
    )
    return RecoveryBound(a, Estimate(c, float(low), float(high), len(gaps)), d, residual)


def _fit(table: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """``a``, ``c``, ``d`` and the root of the mean squared residual; for a given ``c`` the rest is linear."""
    gaps, bits, floor = table
    least = bits.min()

    def solve(c: float) -> tuple[NDArray[np.float64], float]:
        columns = np.stack([2.0 ** (-c * (bits - least)), floor], axis=1)
        return nnls(columns, gaps)  # type: ignore[no-any-return]

    grid = np.linspace(0.05, 8, 160)
    best = int(np.argmin([solve(c)[1] for c in grid]))
    ends = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    c = float(minimize_scalar(lambda c: solve(c)[1], bounds=ends, method="bounded", options={"xatol": 1e-10}).x)
    (a, d), residual = solve(c)
    if a == 0:
        c = math.nan
    scale = 0.0 if a == 0 else float(a * 2.0 ** (c * least))
    return scale, c, float(d), float(residual / math.sqrt(len(gaps)))
