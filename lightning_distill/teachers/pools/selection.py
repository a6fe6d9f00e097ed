"""From scores or difficulties to a choice among teachers. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def hard_select(scores: Tensor) -> Tensor:
    """The teacher with the highest score, the first of equal ones.

    Args:
        scores: Shape ``(..., T)``.

    Returns:
        Indices, shape ``(...)``.

    Example:
        >>> hard_select(torch.tensor([[0.2, 0.9, 0.1], [0.5, 0.5, 0.4]]))
        tensor([1, 0])
    """
    return (scores == scores.amax(dim=-1, keepdim=True)).to(torch.uint8).argmax(dim=-1)


def soft_select(scores: Tensor, *, tau: float = 1.0) -> Tensor:
    """Share of each teacher: ``softmax(scores / tau)``.

    Args:
        scores: Shape ``(..., T)``.
        tau: Positive; small values come close to :func:`hard_select`, large ones to equal shares. It has nothing to do
            with the temperature of the distillation.

    Returns:
        Shape ``(..., T)``, each row sums to 1.

    Raises:
        ValueError: If ``tau`` is not positive and finite.

    Example:
        >>> soft_select(torch.tensor([1.0, 1.0]))
        tensor([0.5000, 0.5000])
    """
    check_tau(tau)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return ((scores - scores.amax(dim=-1, keepdim=True)) / tau).softmax(dim=-1)


def sample_teacher(scores: Tensor, *, tau: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Draw a teacher per row, with the probabilities of :func:`soft_select`.

    Scores may be negative, so that they cannot be divided by their sum to get probabilities.

    Args:
        scores: Shape ``(B, T)``.
        tau: See :func:`soft_select`.
        generator: Source of randomness; the global one of the device by default.

    Returns:
        Indices, shape ``(B,)``.

    Example:
        >>> sample_teacher(torch.tensor([[0.0, -1e4], [-1e4, 0.0]]))
        tensor([0, 1])
    """
    return torch.multinomial(soft_select(scores, tau=tau), 1, generator=generator).squeeze(-1)


def explore(choice: Tensor, teachers: int, epsilon: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Replace a share ``epsilon`` of the choices by teachers drawn with equal probability.

    Args:
        choice: Indices, shape ``(B,)``.
        teachers: How many there are.
        epsilon: In [0, 1].
        generator: Source of randomness, of the device of ``choice``.

    Raises:
        ValueError: If ``epsilon`` is outside [0, 1].

    Example:
        >>> explore(torch.tensor([2, 0]), 3, 0.0)
        tensor([2, 0])
    """
    check_epsilon(epsilon)
    at_random = torch.rand(choice.shape, device=choice.device, generator=generator) < epsilon
    drawn = torch.randint(teachers, choice.shape, device=choice.device, generator=generator)
    return torch.where(at_random, drawn, choice)


def select_by_difficulty(difficulty: Tensor, thresholds: Sequence[float] = (0.3, 0.6)) -> Tensor:
    """The cheap teacher for easy samples, the dear one for hard ones.

    Args:
        difficulty: Shape ``(B,)``.
        thresholds: Rising, one fewer than teachers. A sample goes to the first teacher whose threshold it does not
            exceed, and to the last one if it exceeds them all.

    Returns:
        Places in the order of cost, shape ``(B,)``.

    Raises:
        ValueError: If the thresholds fall or are not finite.

    Example:
        >>> select_by_difficulty(torch.tensor([0.1, 0.3, 0.5, 0.8]))
        tensor([0, 0, 1, 2])
    """
    check_thresholds(thresholds)
    return torch.bucketize(difficulty, torch.tensor(list(thresholds)).to(difficulty))


def bucket_by_difficulty(difficulty: Tensor, buckets: int) -> tuple[Tensor, ...]:
    """Indices of the samples in ``buckets`` groups of nearly equal size, easy ones first; equal ones keep their order.

    Args:
        difficulty: Shape ``(N,)``.
        buckets: How many groups, positive.

    Raises:
        ValueError: If ``buckets`` is not positive.

    Example:
        >>> bucket_by_difficulty(torch.tensor([0.9, 0.1, 0.5]), 2)
        (tensor([1, 2]), tensor([0]))
    """
    if not buckets >= 1:
        raise ValueError(f"`buckets` must be at least 1, got {buckets}.")
    return difficulty.argsort(stable=True).tensor_split(buckets)


class EarlyStop(NamedTuple):
    """What :func:`evaluate_until` did with each sample, each of shape ``(B,)``.

    Attributes:
        evaluated: How many teachers were asked.
        chosen: The place, in the order of asking, of the one that speaks.
    """

    evaluated: Tensor
    chosen: Tensor


def evaluate_until(
    confidence: Callable[[int, Tensor], Tensor], teachers: int, samples: Tensor, *, threshold: float = 0.9
) -> EarlyStop:
    """Ask teachers one after the other, cheap ones first, until one is confident enough.

    Where none is, the most confident one speaks. No teacher is asked about a sample that is settled.

    Args:
        confidence: Of a teacher, by its place, about some of the samples: ``(place, samples[n]) -> (n,)``.
        teachers: How many there are, positive.
        samples: Their indices, shape ``(B,)``.
        threshold: Confidence, in [0, 1], that ends the search.

    Raises:
        ValueError: If ``threshold`` is outside [0, 1] or there are no teachers.

    Example:
        >>> sure = torch.tensor([[0.6, 0.95, 0.99], [0.5, 0.6, 0.7]])
        >>> evaluate_until(lambda place, rows: sure[rows, place], 3, torch.arange(2)).chosen
        tensor([1, 2])
    """
    check_threshold(threshold)
    if teachers < 1:
        raise ValueError(f"`teachers` must be at least 1, got {teachers}.")
    evaluated, chosen = torch.zeros_like(samples), torch.zeros_like(samples)
    best = torch.full(samples.shape, -math.inf, device=samples.device)
    places = torch.arange(len(samples), device=samples.device)
    for teacher in range(teachers):
        if len(places) == 0:
            break
        sure = confidence(teacher, samples[places]).to(best.dtype)
        better = sure > best[places]
        best[places] = torch.maximum(best[places], sure)
        chosen[places[better]] = teacher
        evaluated[places] += 1
        places = places[sure < threshold]
    return EarlyStop(evaluated, chosen)


def check_tau(tau: float) -> None:
    """Refuse a ``tau`` that is not positive and finite."""
    if not 0 < tau < math.inf:
        raise ValueError(f"`tau` must be positive and finite, got {tau}.")


def check_epsilon(epsilon: float) -> None:
    """Refuse a share outside [0, 1]."""
    if not 0 <= epsilon <= 1:
        raise ValueError(f"`epsilon`, the share of random choices, must be in [0, 1], got {epsilon}.")


def check_threshold(threshold: float) -> None:
    """Refuse a confidence outside [0, 1]."""
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold`, a confidence, must be in [0, 1], got {threshold}.")


def check_thresholds(thresholds: Sequence[float]) -> None:
    """Refuse thresholds that fall or are not finite."""
    if not all(map(math.isfinite, thresholds)) or list(thresholds) != sorted(thresholds):
        raise ValueError(f"`thresholds` must be finite and must not fall, got {list(thresholds)}.")
