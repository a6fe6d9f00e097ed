"""How far a student is behind on a task, and what to make of it: temperature, weight, learning rate.

Pure functions. A difficulty ``D`` has no unit: 0 where the student has caught up, 1 where it has everything to learn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def task_difficulty(teacher_accuracy: float, student_accuracy: float, *, clip: bool = True) -> float:
    r"""Performance gap :math:`(A_T - A_S) / A_T`.

    Args:
        teacher_accuracy: ``A_T``, or another score of which more is better; not negative.
        student_accuracy: ``A_S`` on the same data, not negative.
        clip: Give 0 rather than a negative value to a student that is better than its teacher.

    Returns:
        At most 1; 0 where both accuracies are 0.

    Raises:
        ValueError: If an accuracy is negative or not finite.

    Example:
        >>> round(task_difficulty(0.9, 0.72), 3)
        0.2
    """
    _require_not_negative(teacher_accuracy=teacher_accuracy, student_accuracy=student_accuracy)
    if teacher_accuracy == 0:
        return 0.0 if clip or student_accuracy == 0 else -math.inf
    gap = (teacher_accuracy - student_accuracy) / teacher_accuracy
    return max(gap, 0.0) if clip else gap


def difficulty_temperature(
    difficulty: float, *, tau0: float = 4.0, beta: float = 1.0, tau_min: float = 0.5, tau_max: float = 20.0
) -> float:
    r"""Temperature :math:`\tau_0 (1 + \beta D)`, clamped: softer targets for a harder task.

    Args:
        difficulty: ``D``.
        tau0: Temperature of a task that is mastered, positive.
        beta: Growth per unit of difficulty; negative for sharper targets.
        tau_min: Lowest result, positive.
        tau_max: Highest result.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> difficulty_temperature(0.2, tau0=4.0, beta=1.5)
        5.2
    """
    if not 0 < tau0 < math.inf:
        raise ValueError(f"`tau0` must be positive and finite, got {tau0}.")
    if not 0 < tau_min <= tau_max < math.inf:
        raise ValueError(f"`tau_min` and `tau_max` must satisfy 0 < tau_min <= tau_max, got {tau_min} and {tau_max}.")
    if not math.isfinite(beta) or not math.isfinite(difficulty):
        raise ValueError(f"`difficulty` and `beta` must be finite, got {difficulty} and {beta}.")
    return min(max(tau0 * (1 + beta * difficulty), tau_min), tau_max)


def difficulty_weight(difficulty: float, *, weight0: float = 1.0, limit: float = 0.3) -> float:
    r"""Weight :math:`\lambda_0 (1 + \min(D, \theta))` of the teacher's term: it never falls as the task gets harder.

    Args:
        difficulty: ``D``, not negative.
        weight0: :math:`\lambda_0`, not negative.
        limit: :math:`\theta`, the difficulty from which on the weight stays; not negative.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> [difficulty_weight(d) for d in (0.0, 0.1, 0.8)]
        [1.0, 1.1, 1.3]
    """
    _require_not_negative(difficulty=difficulty, weight0=weight0, limit=limit)
    return weight0 * (1 + min(difficulty, limit))


def alignment_factor(cosine: float, *, alpha: float = 1.0) -> float:
    r"""Factor :math:`e^{-\alpha (1 - S)}` of the learning rate: smaller steps where the terms' gradients disagree.

    Args:
        cosine: ``S`` in [-1, 1], the cosine between two gradients; 1 is agreement.
        alpha: How much a conflict costs, not negative.

    Returns:
        In ``[exp(-2 * alpha), 1]``.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> alignment_factor(1.0)
        1.0
    """
    if not -1 <= cosine <= 1:
        raise ValueError(f"`cosine` must be in [-1, 1], got {cosine}.")
    _require_not_negative(alpha=alpha)
    return math.exp(-alpha * (1 - cosine))


@torch.no_grad()
def gradient_cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of the angle between two gradients of the *same* parameters (Du et al. 2018).

    The gradients of two losses with respect to the student can be compared; those of the student's and of the
    teacher's parameters have different shapes and cannot.

    Args:
        first: Gradient of one loss, any shape.
        second: That of the other, same shape.

    Returns:
        In [-1, 1]; 0 if one of them is 0.

    Raises:
        ValueError: If the shapes differ or a gradient is not finite.

    Example:
        >>> gradient_cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0]))
        -1.0
    """
    if first.shape != second.shape:
        raise ValueError(f"The gradients must have the same shape, got {tuple(first.shape)} and {tuple(second.shape)}.")
    a, b = first.flatten().double(), second.flatten().double()
    norms = (a.norm() * b.norm()).item()
    if not math.isfinite(norms):
        raise ValueError("The gradients must be finite; skip steps whose gradients overflowed.")
    return 0.0 if norms == 0 else min(max(torch.dot(a, b).item() / norms, -1.0), 1.0)


def multi_task_loss(
    hard: Sequence[Tensor], soft: Sequence[Tensor], *, weights: Sequence[float], kd_weights: Sequence[float]
) -> Tensor:
    r"""Sum :math:`\sum_i w_i (\mathrm{CE}_i + \lambda_i \mathrm{KD}_i)` over tasks.

    Args:
        hard: Loss on the labels of each task, scalars.
        soft: Loss against the teacher of each task, scalars.
        weights: ``w``, one per task, not negative.
        kd_weights: :math:`\lambda`, one per task, not negative.

    Returns:
        Scalar.

    Raises:
        ValueError: If there are no tasks, the lengths differ or a weight is negative.

    Example:
        >>> multi_task_loss([torch.tensor(1.0)], [torch.tensor(2.0)], weights=[0.5], kd_weights=[3.0])
        tensor(3.5000)
    """
    lengths = [len(hard), len(soft), len(weights), len(kd_weights)]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(
            f"`hard`, `soft`, `weights` and `kd_weights` must have one entry per task, at least one, got {lengths}."
        )
    for name, values in {"weights": weights, "kd_weights": kd_weights}.items():
        if not all(value >= 0 for value in values):
            raise ValueError(f"`{name}` must not be negative, got {list(values)}.")
    losses = [
        weight * (ce + kd_weight * kd)
        for ce, kd, weight, kd_weight in zip(hard, soft, weights, kd_weights, strict=True)
    ]
    return torch.stack(losses).sum()


def _require_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:  # also rejects NaN
            raise ValueError(f"`{name}` must not be negative, got {value}.")
