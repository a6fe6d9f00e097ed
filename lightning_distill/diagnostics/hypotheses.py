"""How much a student may fit, and how many samples it takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.estimates import Estimate, bootstrap_mean
from lightning_distill.diagnostics.observations import fixed_generator, float64


@torch.no_grad()
def empirical_rademacher(
    predictions: Tensor, *, draws: int = 2**16, generator: torch.Generator | None = None
) -> Estimate:
    r"""Empirical Rademacher complexity :math:`E_\sigma \max_h \frac1n \sum_i \sigma_i h(x_i)` of finitely many ``h``.

    How well the set of hypotheses fits random signs on these points: 1 if it fits all of them, near 0 for a poor set.
    (Bartlett and Mendelson 2002.) A subset never has a larger one; how much smaller it is must be measured.

    Args:
        predictions: Value of each hypothesis on each point, shape ``(H, n)``, usually in [-1, 1].
        draws: All ``2 ** n`` sign vectors are used if there are no more than this, and the result is exact;
            otherwise so many random ones.
        generator: Source of randomness; by default one with a fixed seed.

    Returns:
        The complexity; its interval is the 95 % interval of the random draws (a point if the result is exact), and
        ``n`` the number of sign vectors.

    Raises:
        ValueError: If ``predictions`` has another shape or is empty, or ``draws`` is below 2.
    """
    values = float64(predictions)
    if values.ndim != 2 or values.numel() == 0:
        raise ValueError(f"`predictions` must have shape (hypotheses, points), got {tuple(predictions.shape)}.")
    if not draws >= 2:
        raise ValueError(f"`draws` must be at least 2, got {draws}.")
    n = values.shape[1]
    exact = n < 63 and 2**n <= draws
    total = 2**n if exact else draws
    generator = fixed_generator(generator)
    bits = torch.arange(n)
    maxima = []
    for start in range(0, total, 4096):  # in parts, so that many hypotheses fit into memory
        count = min(4096, total - start)
        if exact:
            ones = torch.arange(start, start + count)[:, None] >> bits & 1
        else:
            ones = torch.randint(2, (count, n), generator=generator)
        maxima.append(((2 * ones - 1).double() @ values.T).amax(dim=1) / n)
    best = torch.cat(maxima)
    value = best.mean().item()
    margin = 0.0 if exact else 1.96 * best.std().item() / math.sqrt(total)
    return Estimate(value, value - margin, value + margin, total)


@dataclass(frozen=True)
class SampleEfficiency:
    """Test errors of training alone and of distillation by number of training samples.

    Attributes:
        sizes: Numbers of training samples.
        control_errors: Shape ``(sizes, seeds)``.
        distilled_errors: Shape ``(sizes, seeds)``.
        gains: Error of the control minus error of distillation, paired by seed, for each size.
        control_rate: ``b`` of the least-squares fit ``error = a * n ** -b`` in logarithms; NaN if an error is 0.
        distilled_rate: The same for distillation.
    """

    sizes: tuple[int, ...]
    control_errors: Tensor
    distilled_errors: Tensor
    gains: tuple[Estimate, ...]
    control_rate: float
    distilled_rate: float


def sample_efficiency_curve(
    fit_control: Callable[[int, int], float],
    fit_distilled: Callable[[int, int], float],
    sizes: Sequence[int],
    seeds: Sequence[int],
) -> SampleEfficiency:
    """Does a teacher save samples? Train with and without it on more and more of them, and compare.

    Args:
        fit_control: Trains on labels alone with ``(samples, seed)`` and returns the test error.
        fit_distilled: Trains with the teacher in the same way.
        sizes: Two or more increasing numbers of training samples.
        seeds: One or more seeds; both functions get each of them.

    Raises:
        ValueError: If ``sizes`` does not increase or is too short, or there is no seed.
    """
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ValueError(f"`sizes` must be two or more increasing positive numbers, got {list(sizes)}.")
    if len(seeds) == 0:
        raise ValueError("`seeds` must hold at least one seed, got none.")
    control, distilled = (
        torch.tensor([[fit(size, seed) for seed in seeds] for size in sizes], dtype=torch.float64)
        for fit in (fit_control, fit_distilled)
    )
    gains = tuple(bootstrap_mean(difference) for difference in control - distilled)
    return SampleEfficiency(tuple(sizes), control, distilled, gains, _decay(sizes, control), _decay(sizes, distilled))


def _decay(sizes: Sequence[int], errors: Tensor) -> float:
    """Exponent ``b`` of ``a * n ** -b``, fitted to the mean errors in logarithms."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    x, y = x - x.mean(), errors.mean(dim=1).log()
    return -((x * y).sum() / x.square().sum()).item()
