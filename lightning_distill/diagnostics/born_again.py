"""What generations of self-distillation converge to, and how fast."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.diagnostics.estimates import Verdict

Direction = Literal["forward", "reverse"]


def sd_regularizer(p_next: Tensor, p_previous: Tensor, *, direction: Direction = "reverse") -> Tensor:
    """How far a generation has moved from the one before: KL divergence of each item, nats.

    Args:
        p_next: Probabilities of the new generation, shape ``(items..., C)``.
        p_previous: Probabilities of the generation before, same shape.
        direction: ``"reverse"`` is KL(next || previous), ``"forward"`` is KL(previous || next), which is trained.

    Returns:
        Shape ``(items...)``, float64; 0 where both are equal, infinite where the first has what the second excludes.

    Raises:
        ValueError: If the shapes differ or ``direction`` is unknown.
    """
    _check_direction(direction)
    _check_same_shape(p_next, p_previous)
    p, q = (p_next, p_previous) if direction == "reverse" else (p_previous, p_next)
    p, q = p.detach().cpu().double(), q.detach().cpu().double()
    divergence: Tensor = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(dim=-1)
    return divergence


def ban_operator(f: Tensor, y: Tensor, lam: float, *, direction: Direction = "forward") -> Tensor:
    r"""The best successor of a generation in function space: ``argmin_g CE(g, y) + lam * KL``, of each item.

    Forward, ``KL(f || g)``: :math:`T(f) = (y + \lambda f) / (1 + \lambda)`, since both parts are cross-entropies and
    their sum is one with the averaged target. It is a contraction with the exact rate :math:`\lambda / (1 + \lambda)`,
    and its fixed point is the label distribution ``y`` itself: no regularisation is left.

    Reverse, ``KL(g || f)``: no contraction. Where the label is class ``c``, the logit of ``g_c`` is that of ``f_c``
    plus :math:`1 / (\lambda g_c)`: it grows by more than :math:`1 / \lambda` in every generation.

    Args:
        f: Probabilities of the present generation, all positive, shape ``(items..., C)``.
        y: Labels as probabilities, same shape.
        lam: Weight of the divergence, positive.
        direction: Of the divergence.

    Returns:
        Probabilities of the next generation, float64, shape ``(items..., C)``.

    Raises:
        ValueError: If the shapes differ, ``lam`` is not positive or ``direction`` is unknown.

    Example:
        >>> ban_operator(torch.tensor([0.2, 0.5, 0.3]), torch.tensor([1.0, 0.0, 0.0]), 1.5)
        tensor([0.5200, 0.3000, 0.1800], dtype=torch.float64)
    """
    _check_direction(direction)
    _check_same_shape(f, y)
    if not 0 < lam < math.inf:
        raise ValueError(f"`lam`, the weight of the divergence, must be positive and finite, got {lam}.")
    f, y = f.detach().cpu().double(), y.detach().cpu().double()
    if direction == "forward":
        return (y + lam * f) / (1 + lam)
    # Stationarity: log g_c - y_c / (lam g_c) = log f_c + m, with m such that g sums to 1. The left side grows with g_c,
    # and the sum with m: two nested bisections.
    log_f = f.log()
    low, high = torch.full_like(f[..., :1], -60.0 - 2 / lam), torch.full_like(f[..., :1], 60.0)
    for _ in range(70):
        middle = (low + high) / 2
        too_much = _solve_log(log_f + middle, y / lam).exp().sum(dim=-1, keepdim=True) > 1
        low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
    g = _solve_log(log_f + (low + high) / 2, y / lam).exp()
    return g / g.sum(dim=-1, keepdim=True)


def _solve_log(level: Tensor, k: Tensor) -> Tensor:
    """``u`` with ``u - k * exp(-u) = level``, for ``k >= 0``."""
    low, high = level.clone(), torch.maximum(level + 1, torch.zeros_like(level)) + k + 1
    for _ in range(70):
        middle = (low + high) / 2
        above = middle - k * torch.exp(-middle) > level
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def fixed_point_gap(p_present: Tensor, p_next: Tensor) -> float:
    r"""How far from a fixed point: mean over the items of :math:`\| p_{k+1} - p_k \|_2`.

    Args:
        p_present: Predictions of a generation, shape ``(items..., C)``.
        p_next: Predictions of the next one on the same items.

    Raises:
        ValueError: If the shapes differ.
    """
    _check_same_shape(p_present, p_next)
    return float((p_next.detach().cpu().double() - p_present.detach().cpu().double()).norm(dim=-1).mean())


@dataclass(frozen=True)
class Convergence:
    """What generations do, measured on the same items.

    Attributes:
        gaps: ``fixed_point_gap`` from each generation to the next, ``G - 1`` of them.
        divergences: Mean KL(previous || next), nats, as many; NaN for predictions that are no probabilities.
        rates: Each gap over the one before, ``G - 2`` of them; below 1 the generations come closer.
        rate: Least-squares fit of ``gap_k = a * rate ** k`` in logarithms; NaN for fewer than two gaps, or a gap of 0.
        limit: Where they go, by Aitken's extrapolation of each number, from the last three generations; the last
            generation itself where there are fewer, and where a number does not converge linearly.
        label_distances: Mean distance of each generation from the labels; empty if there are none.
        noise: The gap that two trainings with the same teacher have.
    """

    gaps: tuple[float, ...]
    divergences: tuple[float, ...]
    rates: tuple[float, ...]
    rate: float
    limit: Tensor
    label_distances: tuple[float, ...]
    noise: float

    def verdict(self) -> Verdict:
        """Whether the generations converge linearly: every rate below 1, over three or more, with gaps above noise.

        Gaps that the random numbers of a training explain say nothing, whatever their rates are.
        """
        if len(self.rates) < 3 or min(self.gaps) <= self.noise:
            return "undecided"
        return "supported" if max(self.rates) < 1 else "refuted"


def convergence_diagnostics(
    predictions: Sequence[Tensor] | Tensor, labels: Tensor | None = None, *, noise: float = 0.0
) -> Convergence:
    """Gaps, rates and limit of the predictions of successive generations.

    Args:
        predictions: Of each generation on the same items, in their order: probabilities (or values of a regression),
            each of shape ``(items..., C)``; two or more.
        labels: What they are trained on, same shape as one of them.
        noise: Gap between two trainings that differ by their seed alone, to compare with.

    Raises:
        ValueError: If there are fewer than two generations, or shapes differ.
    """
    said = [values.detach().cpu().double() for values in predictions]
    if len(said) < 2:
        raise ValueError(f"`predictions` must be those of two or more generations, got {len(said)}.")
    for values in [*said[1:], *([] if labels is None else [labels])]:
        _check_same_shape(said[0], values)
    gaps = tuple(fixed_point_gap(*pair) for pair in pairwise(said))
    distributions = all(bool((values >= 0).all() and (values.sum(-1) - 1).abs().max() < 1e-4) for values in said)
    divergences = tuple(
        sd_regularizer(after, before, direction="forward").mean().item() if distributions else math.nan
        for before, after in pairwise(said)
    )
    rates = tuple(after / before if before > 0 else math.nan for before, after in pairwise(gaps))
    return Convergence(
        gaps=gaps,
        divergences=divergences,
        rates=rates,
        rate=_fitted_rate(gaps),
        limit=_aitken(*said[-3:]) if len(said) >= 3 else said[-1],
        label_distances=() if labels is None else tuple(fixed_point_gap(values, labels) for values in said),
        noise=noise,
    )


def _fitted_rate(gaps: Sequence[float]) -> float:
    if len(gaps) < 2 or min(gaps) <= 0:
        return math.nan
    x = torch.arange(len(gaps), dtype=torch.float64)
    x, y = x - x.mean(), torch.tensor(gaps, dtype=torch.float64).log()
    return ((x * y).sum() / x.square().sum()).exp().item()


def _aitken(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """``third - d2 ** 2 / (d2 - d1)`` where the steps ``d1``, ``d2`` shrink without a change of sign."""
    before, after = second - first, third - second
    linear = (after.abs() < before.abs()) & (after * before > 0)
    step = torch.where(linear, after.square() / torch.where(linear, before - after, 1.0) * after.sign(), 0.0)
    return third + step.abs() * after.sign()


@dataclass(frozen=True)
class RidgeGenerations:
    """Born-again kernel ridge regression, in closed form.

    Attributes:
        predictions: Of each generation on the training inputs, shape ``(generations + 1, n)``, generation 0 first.
        fixed_point: What they converge to: the ridge regression of a ``1 + lam`` times larger ridge, shape ``(n,)``.
        errors: Distance of each generation from it, shape ``(generations + 1,)``.
        rate_bound: No error is more than this times the one before.
    """

    predictions: Tensor
    fixed_point: Tensor
    errors: Tensor
    rate_bound: float


def ridge_generations(kernel: Tensor, y: Tensor, ridge: float, lam: float, generations: int) -> RidgeGenerations:
    r"""Generations of kernel ridge regression on targets ``(y + lam * f_k) / (1 + lam)``, from ``f_0 = ridge(y)``.

    A case in which self-distillation does converge to something: with capacity limited by a ridge ``c``, the fixed
    point is not ``y`` but the regression with the ridge ``c (1 + lam)``, at a rate of at most
    :math:`\lambda / (1 + \lambda) \cdot \kappa_{max} / (\kappa_{max} + c)` (``kappa``: eigenvalues of the kernel).
    Mobahi et al. (2020), https://arxiv.org/abs/2002.05715; Borup and Andersen (2021), https://arxiv.org/abs/2102.13088.

    Args:
        kernel: Symmetric, positive semidefinite, shape ``(n, n)``.
        y: Targets, shape ``(n,)``.
        ridge: ``c``, positive.
        lam: Weight of the earlier generation, positive.
        generations: How many after generation 0.

    Raises:
        ValueError: If an argument is outside its range or shapes do not fit.
    """
    for name, value in {"ridge": ridge, "lam": lam, "generations": generations}.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if y.ndim != 1 or kernel.shape != (len(y), len(y)):
        raise ValueError(f"`kernel` must have shape ({len(y)}, {len(y)}) for these targets, got {tuple(kernel.shape)}.")
    kernel, y = kernel.detach().cpu().double(), y.detach().cpu().double()
    identity = torch.eye(len(y), dtype=torch.float64)
    smoother = torch.linalg.solve(kernel + ridge * identity, kernel)
    said = [smoother @ y]
    for _ in range(generations):
        said.append(smoother @ ((y + lam * said[-1]) / (1 + lam)))
    fixed_point = torch.linalg.solve(kernel + ridge * (1 + lam) * identity, kernel) @ y
    predictions = torch.stack(said)
    largest = torch.linalg.eigvalsh(kernel)[-1].item()
    return RidgeGenerations(
        predictions,
        fixed_point,
        (predictions - fixed_point).norm(dim=-1),
        lam / (1 + lam) * largest / (largest + ridge),
    )


@dataclass(frozen=True)
class GenerationBound:
    """The chapter's bound ``error_k <= error_0 - sum of gains + c * sqrt(k / n)`` held against measured errors.

    Attributes:
        gains: ``error_{k-1} - error_k`` of each generation after the first.
        c: The smallest constant for which the bound holds, if gains count only where they are positive, as the bound
            assumes; 0 if all are.
        best: Generation with the smallest error, counted from 0.
        saturated: Whether a generation gained nothing, so that the bound's assumption is not met.
    """

    gains: tuple[float, ...]
    c: float
    best: int
    saturated: bool


def fit_generation_bound(errors: Sequence[float], n: int) -> GenerationBound:
    """What the errors of successive generations say about the bound of their generalisation.

    A constant gain cannot go on: the error would become negative. Look where the gain ends instead.

    Args:
        errors: Of each generation on the same held-out data, the first one first; two or more.
        n: Number of training samples.

    Raises:
        ValueError: If there are fewer than two errors or ``n`` is not positive.

    Example:
        >>> bound = fit_generation_bound([0.30, 0.27, 0.26, 0.262], n=4000)
        >>> bound.best, bound.saturated
        (2, True)
    """
    if len(errors) < 2:
        raise ValueError(f"`errors` must be those of two or more generations, got {len(errors)}.")
    if not n >= 1:
        raise ValueError(f"`n`, the number of training samples, must be positive, got {n}.")
    gains = tuple(before - after for before, after in pairwise(errors))
    claimed, constant = 0.0, 0.0
    for k, gain in enumerate(gains, start=1):
        claimed += max(gain, 0.0)
        constant = max(constant, (errors[k] - errors[0] + claimed) / math.sqrt(k / n))
    best = min(range(len(errors)), key=lambda k: errors[k])
    return GenerationBound(gains, constant if constant > 1e-12 else 0.0, best, any(gain <= 0 for gain in gains))


def _check_direction(direction: str) -> None:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")


def _check_same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"Predictions must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}.")
