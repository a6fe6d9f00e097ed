"""Try several ways to recover accuracy, and keep one only if it helps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

RecoveryStep = Callable[[nn.Module], object]
"""Changes a network in place, or returns another one."""


@dataclass(frozen=True)
class RecoveryReport:
    """What recovery steps gave, each alone from the same network.

    Attributes:
        before: Score without any.
        scores: Score after each step, by name.
        kept: Name of the step that was kept; ``None`` if none was better.
        mode: Whether more (``"max"``) or less (``"min"``) is better.
    """

    before: float
    scores: dict[str, float]
    kept: str | None
    mode: Literal["max", "min"]

    def __str__(self) -> str:
        """A table."""
        width = max(map(len, ("before", *self.scores)))
        lines = [f"{'before':<{width}}  {self.before:10.4f}"]
        lines += [
            f"{name:<{width}}  {score:10.4f}{'  kept' if name == self.kept else ''}"
            for name, score in self.scores.items()
        ]
        return "\n".join(lines)


def recover(
    network: nn.Module,
    steps: Mapping[str, RecoveryStep],
    score: Callable[[nn.Module], float],
    *,
    mode: Literal["max", "min"] = "max",
) -> tuple[nn.Module, RecoveryReport]:
    """Try each recovery step on a copy of ``network``, and keep the best one, if it beats the network as it was.

    The steps are alternatives and not a pipeline: correcting what another step has corrected already can make it worse.
    A combination is a step of its own. The score should come from validation data that no step has seen.

    Args:
        network: The quantized network; not changed.
        steps: By name; each changes the network that it is given, or returns another one (an
            :class:`~lightning_distill.recovery.OutputCalibrator`, say).
        score: Of a network, such as its validation accuracy.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.

    Returns:
        The best network (``network`` itself, if no step was better), and what each step gave.

    Raises:
        ValueError: If there are no steps, or ``mode`` is unknown.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> steps = {"zero": lambda n: nn.init.zeros_(n.bias), "ten": lambda n: nn.init.constant_(n.bias, 10.0)}
        >>> best, report = recover(network, steps, lambda n: abs(n.bias.item()), mode="min")
        >>> report.kept, best.bias.item(), best is network
        ('zero', 0.0, False)
    """
    if not steps:
        raise ValueError("`steps` holds no recovery step to try.")
    if mode not in ("max", "min"):
        raise ValueError(f"`mode` must be 'max' or 'min', got {mode!r}.")
    sign = 1 if mode == "max" else -1
    before = float(score(network))
    best, kept, highest = network, None, sign * before
    scores = {}
    for name, step in steps.items():
        candidate = copy.deepcopy(network)
        returned = step(candidate)
        if isinstance(returned, nn.Module):
            candidate = returned
        scores[name] = float(score(candidate))
        if sign * scores[name] > highest or (math.isnan(highest) and not math.isnan(scores[name])):
            best, kept, highest = candidate, name, sign * scores[name]
    return best, RecoveryReport(before, scores, kept, mode)


def bootstrap_refine(
    network: nn.Module,
    refine: Callable[[nn.Module, nn.Module], object],
    score: Callable[[nn.Module], float],
    *,
    rounds: int = 2,
    mode: Literal["max", "min"] = "max",
) -> tuple[nn.Module, list[float]]:
    r"""Distil a quantized network from itself, again and again: :math:`M_k` teaches :math:`M_{k+1}`.

    That is born-again distillation that goes on with the old weights; :class:`~lightning_distill.BornAgain` does it in
    one training, with a ``reinitialize`` that does nothing. Without labels the teacher is never better than the first
    network; with labels see :func:`~lightning_distill.diagnostics.ban_operator`. The best round is returned, so the
    score never falls.

    Args:
        network: The quantized network; not changed.
        refine: Trains its first argument, in place, from its second, which it must not change.
        score: Of a network, such as its validation accuracy.
        rounds: How often, at least 1.
        mode: Whether more or less of the score is better.

    Returns:
        The best network of all rounds (``network`` itself, if no round was better), and the score of each, that of
        ``network`` first.

    Raises:
        ValueError: If ``rounds`` is below 1 or ``mode`` unknown.
    """
    if not rounds >= 1:
        raise ValueError(f"`rounds` must be at least 1, got {rounds}.")
    if mode not in ("max", "min"):
        raise ValueError(f"`mode` must be 'max' or 'min', got {mode!r}.")
    sign = 1 if mode == "max" else -1
    best, scores, teacher = network, [float(score(network))], network
    for _ in range(rounds):
        student = copy.deepcopy(teacher)
        refine(student, teacher)
        scores.append(float(score(student)))
        if sign * scores[-1] > max(sign * value for value in scores[:-1]):
            best = student
        teacher = student
    return best, scores


__all__ = ["RecoveryReport", "RecoveryStep", "bootstrap_refine", "recover"]
