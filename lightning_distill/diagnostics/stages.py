"""What a chain of students keeps and loses on its way down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StageInformation:
    """Information about the labels that is lost from stage to stage.

    Attributes:
        stage_losses: Lost in each step.
        total: Their sum.
        direct: Lost from the first network to the last: the same number.
    """

    stage_losses: list[float]
    total: float
    direct: float


def stage_information(information: Sequence[float]) -> StageInformation:
    """How much information is lost in each stage of a chain.

    Each step loses less than the whole way: it is a part of it. So that says nothing for or against stages; the losses
    always add up to that of the way from the first network to the last (ERR-47).

    Args:
        information: Of each network about the labels, from the first teacher to the last student, in one unit: such
            as the bound of :func:`~lightning_distill.diagnostics.linear_probe`, or ``H(Y)`` minus the cross-entropy.

    Raises:
        ValueError: If there are fewer than two networks.

    Example:
        >>> found = stage_information([3.0, 2.0, 1.5])
        >>> found.stage_losses, found.total == found.direct
        ([1.0, 0.5], True)
    """
    _check_chain("information", information)
    losses = [before - after for before, after in itertools.pairwise(information)]
    return StageInformation(losses, math.fsum(losses), information[0] - information[-1])


@dataclass(frozen=True)
class Retention:
    """What a chain of stages keeps of the teacher's accuracy, and what one step does.

    Attributes:
        stages: Accuracy of each student over that of its own teacher.
        progressive: Their product: what is kept in the end.
        direct: What a student taught by the first teacher keeps.
        holds: Whether the chain keeps more.
        equal_per_stage_needed: What each stage must keep, if all keep the same, for the chain to be as good.
    """

    stages: list[float]
    progressive: float
    direct: float
    holds: bool
    equal_per_stage_needed: float


def retention_compare(stages: Sequence[float], direct: float) -> Retention:
    """Compare the product of the stages' retentions with that of direct distillation.

    A product of numbers below 1 is below each of them, so a chain needs ``r_i > r_direct ** (1 / k)`` (ERR-48). Cho and
    Hariharan (2019, section 4.4) found that chains do not pay; measure it.

    Args:
        stages: Accuracy of each stage's student over that of its teacher, positive.
        direct: Accuracy of the directly taught student over that of the first teacher, positive.

    Raises:
        ValueError: If a number is not positive, or there is no stage.

    Example:
        >>> round(retention_compare([0.95, 0.95, 0.95], 0.83).progressive, 4)
        0.8574
    """
    if not stages or not all(0 < value < math.inf for value in [*stages, direct]):
        raise ValueError(f"Retentions must be positive, of one stage at least, got {list(stages)} and {direct}.")
    product = math.prod(stages)
    return Retention(list(stages), product, direct, product > direct, direct ** (1 / len(stages)))


@dataclass(frozen=True)
class Degradation:
    """What is lost from stage to stage.

    Attributes:
        drops: Accuracy before minus accuracy after each step; negative where a student is better than its teacher.
        total: From the first network to the last.
        bound: Sum of the sizes of the drops, which ``total`` cannot exceed; equal where each step loses.
    """

    drops: list[float]
    total: float
    bound: float


def stage_degradation(accuracies: Sequence[float]) -> Degradation:
    """Measured drops of a chain, and what they bound.

    ``|A_i - A_{i-1}| <= eps_i`` guarantees nothing as long as nobody says what ``eps_i`` is (ERR-50): it is read off
    the finished stages.

    Args:
        accuracies: From the first teacher to the last student.

    Raises:
        ValueError: If there are fewer than two.

    Example:
        >>> stage_degradation([0.9, 0.8, 0.85]).bound
        0.15
    """
    _check_chain("accuracies", accuracies)
    drops = [before - after for before, after in itertools.pairwise(accuracies)]
    return Degradation(drops, accuracies[0] - accuracies[-1], round(math.fsum(map(abs, drops)), 12))


@dataclass(frozen=True)
class Landscape:
    """What lies between two states of a network.

    Attributes:
        losses: At equally spaced points from the first to the second state.
        barrier: Largest excess of the loss over the straight line between its ends; 0 where it never rises above it.
        smoothness: Largest change of the gradient over the length of a random step, at the first state: an estimate
            from below of the Lipschitz constant there.
    """

    losses: list[float]
    barrier: float
    smoothness: float


def landscape_smoothness(
    network: nn.Module,
    loss: Callable[[nn.Module], Tensor],
    end: Mapping[str, Tensor],
    *,
    points: int = 21,
    probes: int = 8,
    radius: float = 1e-3,
    seed: int = 0,
) -> Landscape:
    """Loss on the straight line from a network's weights to others, and how fast its gradient changes.

    Whether stages make the way smoother: compare the start of a stage, and the way to what it became, with those of
    direct distillation.

    Args:
        network: Whose weights are the first state; it is left as it was.
        loss: Of the network on fixed data, a scalar.
        end: Weights of the second state, by the names of ``network.named_parameters()``.
        points: On the line, ends included, at least 2.
        probes: Random steps.
        radius: Length of a step, relative to the norm of the weights.
        seed: Of the steps.

    Raises:
        ValueError: If ``points`` or ``probes`` is too small, or ``end`` has other weights.
    """
    if not points >= 2 or not probes >= 1:
        raise ValueError(f"`points` must be at least 2 and `probes` at least 1, got {points} and {probes}.")
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    if wrong := [name for name, value in start.items() if name not in end or end[name].shape != value.shape]:
        raise ValueError(f"`end` must hold all weights of the network; {wrong[0]!r} is missing or of another shape.")
    generator = torch.Generator().manual_seed(seed)
    try:
        losses = []
        for share in torch.linspace(0, 1, points).tolist():
            _set(network, {name: torch.lerp(value, end[name].to(value), share) for name, value in start.items()})
            with torch.no_grad():
                losses.append(float(loss(network)))
        _set(network, start)
        first = _gradient(network, loss)
        length = radius * math.sqrt(sum(float(value.square().sum()) for value in start.values()))
        length = length or radius
        ratios = []
        for _ in range(probes):
            steps = {name: torch.randn(value.shape, generator=generator).to(value) for name, value in start.items()}
            norm = math.sqrt(sum(float(step.square().sum()) for step in steps.values()))
            _set(network, {name: value + steps[name] * (length / norm) for name, value in start.items()})
            ratios.append(float((_gradient(network, loss) - first).norm()) / length)
    finally:
        _set(network, start)
    line = torch.linspace(losses[0], losses[-1], points).tolist()
    return Landscape(losses, max(0.0, *(a - b for a, b in zip(losses, line, strict=True))), max(ratios))


def _set(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(values[name])


def _gradient(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss(network), parameters, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )


def _check_chain(name: str, values: Sequence[float]) -> None:
    if len(values) < 2 or not all(map(math.isfinite, values)):
        raise ValueError(
            f"`{name}` must be two finite numbers or more, one per network of a chain, got {list(values)}."
        )


__all__ = [
    "Degradation",
    "Landscape",
    "Retention",
    "StageInformation",
    "landscape_smoothness",
    "retention_compare",
    "stage_degradation",
    "stage_information",
]
