"""What the moving average of a student's weights is like."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distill.diagnostics.estimates import Estimate, Verdict


@dataclass(frozen=True)
class EMAReport:
    """A moving average beside the student that it follows.

    Attributes:
        distance: Of the weights, over the norm of the student's; NaN if no networks were given.
        variance_ratio: Variance over time of the teacher's predictions over that of the student's, with a bootstrap
            interval over the items. Below 1 the teacher is the steadier of the two.
    """

    distance: float
    variance_ratio: Estimate

    def verdict(self) -> Verdict:
        """Whether the claim that the teacher is steadier is supported: the whole interval decides."""
        if self.variance_ratio.high < 1:
            return "supported"
        return "refuted" if self.variance_ratio.low > 1 else "undecided"


def ema_report(
    teacher_predictions: Tensor,
    student_predictions: Tensor,
    *,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
) -> EMAReport:
    """Is the averaged teacher steadier than its student?

    Args:
        teacher_predictions: Probabilities at several moments of the training on the same items, shape
            ``(moments, n, C)``, two moments or more.
        student_predictions: The same of the student.
        teacher: The averaged network, for the distance of the weights.
        student: The student's.

    Raises:
        ValueError: If the shapes differ or there are too few moments.
    """
    if teacher_predictions.shape != student_predictions.shape or teacher_predictions.ndim != 3:
        raise ValueError(
            "Predictions must have the shape (moments, items, classes), the same for both, got "
            f"{tuple(teacher_predictions.shape)} and {tuple(student_predictions.shape)}."
        )
    if len(teacher_predictions) < 2:
        raise ValueError("A variance over time needs two or more moments, got one.")
    ours, theirs = (
        values.detach().cpu().double().var(dim=0).sum(dim=-1) for values in (teacher_predictions, student_predictions)
    )
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(ours), (len(ours),), generator=generator) for _ in range(2000)]
    ratios = torch.stack([ours[rows].mean() / theirs[rows].mean() for rows in draws])
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    distance = math.nan
    if teacher is not None and student is not None:
        pairs = list(zip(teacher.parameters(), student.parameters(), strict=True))
        apart = math.sqrt(sum(float((a.detach() - b.detach()).double().square().sum()) for a, b in pairs))
        distance = apart / math.sqrt(sum(float(b.detach().double().square().sum()) for _, b in pairs))
    return EMAReport(distance, Estimate((ours.mean() / theirs.mean()).item(), low, high, len(ours)))


@dataclass(frozen=True)
class ConvergenceSlope:
    """How the suboptimality of stochastic gradient descent falls with the number of steps, with and without averaging.

    Attributes:
        steps: Lengths of the trainings.
        last: Mean suboptimality of the last weights, by length.
        averaged: The same of their moving average.
        slope: Log-log slope of ``averaged``, a bootstrap estimate over the seeds; -0.5 is the plain rate.
    """

    steps: tuple[int, ...]
    last: tuple[float, ...]
    averaged: tuple[float, ...]
    slope: Estimate


def ema_convergence_slope(
    steps: Sequence[int] = (1000, 4000, 16000),
    *,
    curvatures: Sequence[float] = (1.0, 0.3),
    lr: float = 0.5,
    horizon: float | None = None,
    seeds: int = 200,
) -> ConvergenceSlope:
    r"""Does an averaged teacher converge faster? Noisy gradient descent on a quadratic, whose optimum is known.

    The loss is :math:`\tfrac12 \sum_i h_i \theta_i^2`, its gradient has noise of variance 1 in each direction, the
    learning rate is ``lr / sqrt(T)`` for a training of ``T`` steps. The rate :math:`O(1 / \sqrt T)` is that of plain
    gradient descent; the average changes the constant.

    Args:
        steps: Lengths of the trainings, two or more.
        curvatures: ``h``, positive.
        lr: Learning rate of a training of one step, positive.
        horizon: ``1 / (1 - momentum)`` of the average, more than 1. Default: the square root of the length; a constant
            one helps less and less, as with a smaller learning rate the weights themselves move more slowly.
        seeds: Independent trainings, two or more.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if len(steps) < 2 or min(steps) < 1:
        raise ValueError(f"`steps` must be two or more positive numbers, got {list(steps)}.")
    if not (min(curvatures, default=0.0) > 0 and lr > 0 and (horizon is None or horizon > 1) and seeds >= 2):
        raise ValueError(
            "`curvatures` and `lr` must be positive, `horizon` above 1 and `seeds` at least 2, got "
            f"{list(curvatures)}, {lr}, {horizon} and {seeds}."
        )
    generator = torch.Generator().manual_seed(0)
    h = torch.tensor(curvatures, dtype=torch.float64)
    last, averaged = [], []
    for length in steps:
        rate = lr / math.sqrt(length)
        theta = torch.ones(seeds, len(h), dtype=torch.float64)
        average = theta.clone()
        for _ in range(length):
            noise = torch.randn(theta.shape, generator=generator, dtype=torch.float64)
            theta = theta - rate * (h * theta + noise)
            average.lerp_(theta, 1 / (horizon or math.sqrt(length)))
        last.append(0.5 * (h * theta.square()).sum(dim=-1))
        averaged.append(0.5 * (h * average.square()).sum(dim=-1))
    x = torch.tensor(steps, dtype=torch.float64).log()
    x = x - x.mean()
    weights = x / x.square().sum()
    # The slope of the means; its uncertainty from that of each mean, by resampling the trainings.
    draws = [torch.randint(seeds, (seeds,), generator=generator) for _ in range(1000)]
    slopes = torch.stack(
        [sum(w * v[rows].mean().log() for w, v in zip(weights, averaged, strict=True)) for rows in draws]
    )
    value = sum(float(w * v.mean().log()) for w, v in zip(weights, averaged, strict=True))
    low, high = slopes.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return ConvergenceSlope(
        tuple(steps),
        tuple(values.mean().item() for values in last),
        tuple(values.mean().item() for values in averaged),
        Estimate(value, low, high, seeds),
    )
