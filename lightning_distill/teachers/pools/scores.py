"""How good each teacher of a pool is for a sample, and how hard the sample is for them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.outputs import UNLABELLED


def teacher_scores(
    probs: Tensor, labels: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.1
) -> Tensor:
    r"""Score of each teacher for each sample: :math:`\alpha \max_c p_c + \beta [\arg\max p = y] - \gamma H(p)`.

    Confident, right and certain teachers get high scores. A sample without a label has no middle part, for all teachers
    alike: there the scores rank by confidence alone, and a teacher that is confident and wrong wins. With soft labels
    the middle part is the probability that the label gives to the teacher's class.

    Fukuda et al. (2017) choose teachers per sample; Zhang et al. (2022, CA-MKD, https://arxiv.org/abs/2201.00007) weigh
    them by how well they know the label.

    Args:
        probs: Probabilities of ``T`` teachers, shape ``(T, B, C)``.
        labels: Class indices, shape ``(B,)``, ``-100`` where there is none; class probabilities, ``(B, C)``; or
            ``None``.
        alpha: Weight of the confidence, finite.
        beta: Weight of being right.
        gamma: Weight of the entropy in nats.

    Returns:
        Shape ``(B, T)``, float32 or wider; may be negative.

    Raises:
        ValueError: If ``probs`` or ``labels`` has another shape, or a weight is not finite.

    Example:
        >>> probs = torch.tensor([[[0.7, 0.2, 0.1]], [[0.2, 0.5, 0.3]]])
        >>> teacher_scores(probs, torch.tensor([0]), gamma=0.0)
        tensor([[1.7000, 0.5000]])
    """
    _require_finite(alpha=alpha, beta=beta, gamma=gamma)
    if probs.ndim != 3:
        raise ValueError(f"`probs` must have the shape (teachers, samples, classes), got {tuple(probs.shape)}.")
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    confidence, predicted = probs.max(dim=-1)
    scores = alpha * confidence - gamma * torch.special.entr(probs).sum(dim=-1)
    if labels is not None:
        scores = scores + beta * _rightness(predicted, labels, probs)
    by_sample: Tensor = scores.T
    return by_sample


def cost_aware_scores(
    accuracy: Tensor | Sequence[float],
    cost: Tensor | Sequence[float],
    confidence: Tensor | Sequence[float] | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.5,
    gamma: float = 0.3,
) -> Tensor:
    """Score of each teacher: ``alpha * accuracy - beta * cost + gamma * confidence``.

    Args:
        accuracy: In [0, 1], shape ``(T,)``.
        cost: Not negative, same shape. Costs enter as they are: relative to the dearest teacher they are in [0, 1].
        confidence: Mean largest probability, same shape; needed unless ``gamma`` is 0.
        alpha: Weight of the accuracy, finite.
        beta: Weight of the cost, not negative; a large one picks the cheapest.
        gamma: Weight of the confidence.

    Returns:
        Shape ``(T,)``, float64.

    Raises:
        ValueError: If a number is outside its range, shapes differ, or the confidence is missing.

    Example:
        >>> cost_aware_scores([0.9, 0.8], [1.0, 0.1], gamma=0.0)
        tensor([0.4000, 0.7500], dtype=torch.float64)
    """
    _require_finite(alpha=alpha, beta=beta, gamma=gamma)
    if beta < 0:
        raise ValueError(f"`beta`, the weight of the cost, must not be negative, got {beta}.")
    if confidence is None and gamma != 0:
        raise ValueError(f"`confidence` is None, but `gamma` is {gamma}. Pass the confidences, or `gamma=0`.")
    accuracy, cost = (torch.as_tensor(values, dtype=torch.float64) for values in (accuracy, cost))
    confidence = torch.zeros_like(accuracy) if confidence is None else torch.as_tensor(confidence, dtype=torch.float64)
    if not accuracy.shape == cost.shape == confidence.shape:
        raise ValueError(
            "`accuracy`, `cost` and `confidence` must have one entry per teacher, got "
            f"{accuracy.numel()}, {cost.numel()} and {confidence.numel()}."
        )
    if not (cost.isfinite() & (cost >= 0)).all():
        raise ValueError(f"`cost` must be finite and not negative, got {cost.tolist()}.")
    for name, values in {"accuracy": accuracy, "confidence": confidence}.items():
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"`{name}` must be in [0, 1], got {values.tolist()}.")
    return alpha * accuracy - beta * cost + gamma * confidence


def vote_disagreement(probs: Tensor) -> Tensor:
    """Difficulty of a sample: the share of teachers that do not vote with the largest group, in [0, 1 - 1 / T].

    With three teachers only 0, 1/3 and 2/3 occur.

    Args:
        probs: Probabilities, or logits, of ``T`` teachers, shape ``(T, B, C)``.

    Returns:
        Shape ``(B,)``, float32.

    Example:
        >>> vote_disagreement(torch.eye(2)[torch.tensor([[0], [0], [1], [0]])])
        tensor([0.2500])
    """
    votes = torch.nn.functional.one_hot(probs.argmax(dim=-1), probs.shape[-1]).sum(dim=0)
    return 1 - votes.max(dim=-1).values / len(probs)


def confidence_difficulty(probs: Tensor) -> Tensor:
    """Difficulty of a sample: 1 minus the teachers' mean largest probability, in [0, 1 - 1 / C].

    Args:
        probs: Probabilities of ``T`` teachers, shape ``(T, B, C)``.

    Returns:
        Shape ``(B,)``, float32 or wider.

    Example:
        >>> confidence_difficulty(torch.tensor([[[0.9, 0.1]], [[0.3, 0.7]]]))
        tensor([0.2000])
    """
    probs = probs.to(torch.promote_types(probs.dtype, torch.float32))
    return 1 - probs.amax(dim=-1).mean(dim=0)


def _rightness(predicted: Tensor, labels: Tensor, probs: Tensor) -> Tensor:
    """Whether each teacher's class is the label's, 0 without one; of soft labels, its probability. ``(T, B)``."""
    if labels.is_floating_point():
        if labels.shape != probs.shape[1:]:
            raise ValueError(
                f"`labels` are class probabilities of shape {tuple(labels.shape)}, expected {tuple(probs.shape[1:])}."
            )
        return labels.to(probs.dtype).expand_as(probs).gather(-1, predicted.unsqueeze(-1)).squeeze(-1)
    if labels.shape != probs.shape[1:2]:
        raise ValueError(f"`labels` must have the shape {tuple(probs.shape[1:2])}, got {tuple(labels.shape)}.")
    return ((predicted == labels) & (labels != UNLABELLED)).to(probs.dtype)


def _require_finite(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"`{name}` must be finite, got {value}.")
