"""What a pool of teachers could give, and what a choice among them gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PairingReport(NamedTuple):
    """Accuracies of choosing a teacher per region, each in [0, 1].

    Attributes:
        selected: With the choice.
        best_single: With the best teacher everywhere.
        oracle: With the best teacher of each region.
        random: With a teacher drawn with equal probabilities: never above ``best_single``.
        worst: With the worst teacher of each region.
        regret: ``oracle - selected``, not negative.
    """

    selected: float
    best_single: float
    oracle: float
    random: float
    worst: float
    regret: float


def pairing_report(accuracy: Tensor, assignment: Tensor, mass: Tensor | None = None) -> PairingReport:
    """Compare a choice of teachers with a single one, with the best possible and with chance.

    The choice is never better than the oracle. It may well be worse than the best single teacher. These are accuracies
    of teachers; that a student gains as much supposes that what it learns in one region does not disturb another.

    Args:
        accuracy: Of each teacher in each region, shape ``(R, T)``, in [0, 1]. A region may be a single sample.
        assignment: The teacher of each region, shape ``(R,)``, or its shares, shape ``(R, T)``, rows summing to 1.
        mass: Size of each region, not negative, shape ``(R,)``; equal by default. Regions must not overlap.

    Raises:
        ValueError: If a shape or a number does not fit.

    Example:
        >>> accuracy = torch.tensor([[0.9, 0.4], [0.3, 0.8]])
        >>> report = pairing_report(accuracy, torch.tensor([1, 0]))
        >>> round(report.selected, 2), round(report.best_single, 2), round(report.oracle, 2)
        (0.35, 0.6, 0.85)
    """
    accuracy = accuracy.detach().double().cpu()
    if accuracy.ndim != 2 or accuracy.numel() == 0:
        raise ValueError(f"`accuracy` must have the shape (regions, teachers), got {tuple(accuracy.shape)}.")
    if not ((accuracy >= 0) & (accuracy <= 1)).all():
        raise ValueError("`accuracy` must be in [0, 1].")
    regions, teachers = accuracy.shape
    mass = torch.ones(regions, dtype=torch.float64) if mass is None else mass.detach().double().cpu()
    if mass.shape != (regions,) or not (mass >= 0).all() or mass.sum() <= 0:
        raise ValueError(f"`mass` must have one entry per region ({regions}), none negative, not all zero.")
    mass = mass / mass.sum()
    single = mass @ accuracy
    selected = float(mass @ (_assigned(assignment.cpu(), regions, teachers) * accuracy).sum(dim=1))
    oracle = float(mass @ accuracy.amax(dim=1))
    return PairingReport(
        selected=selected,
        best_single=float(single.max()),
        oracle=oracle,
        random=float(single.mean()),
        worst=float(mass @ accuracy.amin(dim=1)),
        regret=max(oracle - selected, 0.0),
    )


def diversity(outputs: Tensor, *, unbiased: bool = False) -> float:
    r"""Mean distance between the outputs of teachers: :math:`\frac{1}{T^2} \sum_{ij} \lVert f_i - f_j \rVert`.

    The norm is over all samples and classes, so it grows with their number. The pairs ``i = j`` add nothing but are
    counted: the mean over pairs of different teachers, with ``unbiased``, is ``T / (T - 1)`` times as large.

    Args:
        outputs: Shape ``(T, N, C)``.
        unbiased: See above; needs two teachers.

    Raises:
        ValueError: If the shape does not fit.

    Example:
        >>> diversity(torch.zeros(3, 4, 2))
        0.0
    """
    flat = _flat(outputs)
    teachers = len(flat)
    if unbiased and teachers < 2:
        raise ValueError("`unbiased` compares different teachers, but there is one.")
    total = float((flat.unsqueeze(0) - flat.unsqueeze(1)).norm(dim=-1).sum())
    return total / (teachers * (teachers - 1) if unbiased else teachers**2)


def output_correlation(outputs: Tensor) -> Tensor:
    """Pearson correlation of the outputs of each two teachers over samples and classes; constant ones have 0.

    Args:
        outputs: Shape ``(T, N, C)``.

    Returns:
        Shape ``(T, T)``, float64, with ones on the diagonal.

    Example:
        >>> output_correlation(torch.tensor([[[1.0, 2.0]], [[2.0, 4.0]]])).round(decimals=9).flatten()
        tensor([1., 1., 1., 1.], dtype=torch.float64)
    """
    flat = _flat(outputs)
    centred = flat - flat.mean(dim=1, keepdim=True)
    norms = centred.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, centred / norms.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    return (unit @ unit.T).clamp(-1, 1).fill_diagonal_(1.0)


def correlation_filter(outputs: Tensor, rho: float, *, order: Sequence[int] | None = None) -> list[int]:
    """Teachers of which no two correlate by ``rho`` or more, in absolute value: a greedy choice, in the order given.

    Args:
        outputs: Shape ``(T, N, C)``.
        rho: In (0, 1].
        order: Places of the teachers, those to keep first in front (by accuracy, say); as they stand by default.

    Returns:
        Places that are kept, in that order; the first one always.

    Raises:
        ValueError: If ``rho`` is outside its range or ``order`` is no order of the teachers.

    Example:
        >>> correlation_filter(torch.tensor([[[1.0, 2.0, 0.0]], [[2.0, 4.0, 0.0]], [[1.0, 0.0, 1.0]]]), 0.95)
        [0, 2]
    """
    if not 0 < rho <= 1:
        raise ValueError(f"`rho` must be in (0, 1], got {rho}.")
    correlation = output_correlation(outputs).abs()
    order = range(len(correlation)) if order is None else order
    if sorted(order) != list(range(len(correlation))):
        raise ValueError(f"`order` must name each of the {len(correlation)} teachers once, got {list(order)}.")
    kept: list[int] = []
    for teacher in order:
        if all(correlation[teacher, other] < rho for other in kept):
            kept.append(teacher)
    return kept


def complementarity(correct: Tensor) -> float:
    """How much more an oracle that always finds a right teacher gets than the best teacher, in [0, 1].

    Args:
        correct: Whether each teacher is right about each sample, shape ``(T, N)``.

    Raises:
        ValueError: If the shape does not fit.

    Example:
        >>> complementarity(torch.tensor([[True, False], [False, True]]))
        0.5
    """
    if correct.ndim != 2 or correct.numel() == 0:
        raise ValueError(f"`correct` must have the shape (teachers, samples), got {tuple(correct.shape)}.")
    right = correct.bool().double()
    return float(right.amax(dim=0).mean() - right.mean(dim=1).max())


def _assigned(assignment: Tensor, regions: int, teachers: int) -> Tensor:
    if assignment.ndim == 1 and not assignment.is_floating_point():
        if len(assignment) != regions or not ((assignment >= 0) & (assignment < teachers)).all():
            raise ValueError(f"`assignment` must name one of {teachers} teachers for each of {regions} regions.")
        return torch.nn.functional.one_hot(assignment, teachers).double()
    shares = assignment.detach().double()
    if (
        shares.shape != (regions, teachers)
        or not (shares >= 0).all()
        or not torch.allclose(shares.sum(dim=1), torch.ones(regions, dtype=torch.float64), atol=1e-5)
    ):
        raise ValueError(
            f"`assignment` must be indices of shape {(regions,)}, or shares of shape {(regions, teachers)}, not "
            f"negative, that sum to 1; got shape {tuple(shares.shape)}."
        )
    return shares


def _flat(outputs: Tensor) -> Tensor:
    if outputs.ndim != 3 or outputs.numel() == 0:
        raise ValueError(f"`outputs` must have the shape (teachers, samples, classes), got {tuple(outputs.shape)}.")
    return outputs.detach().double().cpu().flatten(1)
