"""Thresholds of early exits from validation data, and what they do on other data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.compression.early_exit import EarlyExitNetwork
from lightning_distill.compression.exit_rules import (
    Criterion,
    ExitReport,
    choose_thresholds,
    exit_confidence,
    exit_curve,
    exit_report,
)
from lightning_distill.modes import inference
from lightning_distill.outputs import UNLABELLED, Outputs
from lightning_distill.tasks import Classification, Task


@dataclass(frozen=True)
class ExitMeasurements:
    """What every exit says about some data.

    Attributes:
        confidences: Of the auxiliary exits, shape ``(N, E)``.
        correct: Whether each exit is right, the network's own output last; boolean, shape ``(N, E + 1)``.
        costs: Floating-point operations of a sample that leaves at each exit, heads included; a multiply-add counts as
            two. What is no matrix product, convolution or attention is not counted.
        full_cost: Those of the network without heads.
        names: Of the exits.
    """

    confidences: Tensor
    correct: Tensor
    costs: tuple[float, ...]
    full_cost: float
    names: tuple[str, ...]

    def report(self, thresholds: list[float]) -> ExitReport:
        """What these thresholds do."""
        return exit_report(
            self.confidences, self.correct, self.costs, thresholds, full_cost=self.full_cost, names=self.names
        )

    def curve(self, points: int = 25) -> list[ExitReport]:
        """Accuracy against cost, with one threshold for all exits; see :func:`exit_curve`."""
        return exit_curve(
            self.confidences, self.correct, self.costs, full_cost=self.full_cost, names=self.names, points=points
        )


def measure_exits(network: EarlyExitNetwork, batches: Iterable[Any], *, task: Task | None = None) -> ExitMeasurements:
    """Ask every exit about every labelled sample.

    Args:
        network: The network with its heads.
        batches: Labelled batches, such as a data loader.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Raises:
        ValueError: If there is no labelled sample, or the taps are out of order.
        TypeError: If ``task`` is one without classes, or one whose items are tokens.
    """
    task = Classification() if task is None else task
    first, batches = first_and_all(batches)
    confidences, correct = ask_exits(_Everybody(network), batches, task, network.criterion)
    with inference(network):
        costs, full_cost = _operations(network, task, first)
    return ExitMeasurements(confidences, correct, costs, full_cost, (*network.heads.taps, "end"))


def ask_exits(asked: nn.Module, batches: Iterable[Any], task: Task, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """What all exits say about every labelled sample.

    Args:
        asked: Gives :class:`~lightning_distill.outputs.Outputs` with the logits of the last exit, and of the ones
            before it as features.
        batches: Labelled batches.
        task: How a batch is read.
        criterion: Of the confidence.

    Returns:
        Confidences of all but the last exit, ``(N, E)``, and whether each is right, ``(N, E + 1)``; on the CPU.

    Raises:
        ValueError: If there is no labelled sample.
        TypeError: If ``task`` is one without classes, or one whose items are tokens.
    """
    if not isinstance(task, Classification):
        raise TypeError(
            f"Early exits need one class per sample, `Classification` or `SequenceClassification`, got "
            f"{type(task).__name__}."
        )
    confidences, correct = [], []
    with inference(asked):
        for batch in batches:
            outputs = task.run(asked, batch)
            labels = task.labels(batch)
            if labels is None or labels.is_floating_point() or not (keep := labels != UNLABELLED).any():
                continue
            logits = [*outputs.features.values(), outputs.logits]
            confidences.append(torch.stack([exit_confidence(said[keep], criterion) for said in logits[:-1]], dim=1))
            correct.append(torch.stack([said[keep].argmax(dim=-1) == labels[keep] for said in logits], dim=1))
    if not confidences:
        raise ValueError("`batches` hold no labelled sample, so thresholds cannot be judged. Pass a validation loader.")
    return torch.cat(confidences).cpu(), torch.cat(correct).cpu()


def first_and_all(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first of ``batches``, and all of them; ``None`` if there is none."""
    rest = iter(batches)
    first = next(rest, None)
    return first, rest if first is None else chain([first], rest)


def calibrate_exits(
    network: EarlyExitNetwork,
    batches: Iterable[Any],
    *,
    max_drop: float | None = None,
    max_cost: float | None = None,
    task: Task | None = None,
) -> ExitReport:
    """Set the thresholds of ``network`` to what is best on ``batches``, and whether it may split them.

    Args:
        network: The network with its heads; changed in place.
        batches: Labelled *validation* batches, such as a data loader.
        max_drop: Accuracy that may be lost against the whole network, in [0, 1]: the least cost is sought.
        max_cost: Mean cost that may be spent, as a share of the whole network's: the best accuracy is sought. Exactly
            one of the two.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Returns:
        What the thresholds do on ``batches``. They were chosen there, so it is a little too good:
        :func:`evaluate_exits` measures on other data.

    Warns:
        UserWarning: If there are exits that nobody takes.

    Raises:
        ValueError: As :func:`choose_thresholds` and :func:`measure_exits`.
    """
    if max_cost is not None and not max_cost > 0:
        raise ValueError(f"`max_cost`, a share of the whole network's operations, must be positive, got {max_cost}.")
    batches = list(batches)
    measured = measure_exits(network, batches, task=task)
    limit = None if max_cost is None else max_cost * measured.full_cost
    thresholds = choose_thresholds(
        measured.confidences, measured.correct, measured.costs, max_drop=max_drop, max_cost=limit
    )
    network.thresholds = thresholds
    with inference(network):
        network.sub_batches = _Splitting(network).try_on(batches, Classification() if task is None else task)
    report = replace(measured.report(thresholds), sub_batches=network.sub_batches)
    _warn_of_unused(report)
    return report


def evaluate_exits(network: EarlyExitNetwork, batches: Iterable[Any], *, task: Task | None = None) -> ExitReport:
    """What the present thresholds of ``network`` do on ``batches``.

    Args:
        network: The network with its heads.
        batches: Labelled batches, such as a data loader of test data.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Warns:
        UserWarning: If there are exits that nobody takes.

    Raises:
        ValueError: As :func:`measure_exits`.
    """
    report = measure_exits(network, batches, task=task).report(network.thresholds)
    report = replace(report, sub_batches=network.sub_batches)
    _warn_of_unused(report)
    return report


class _Everybody(nn.Module):
    """Says what all exits say, as outputs with the heads' logits as features."""

    def __init__(self, network: EarlyExitNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        *heads, own = self.network.all_logits(*args, **kwargs)
        return Outputs(own, features=dict(zip(self.network.heads.taps, heads, strict=True)))


class _LeaveAt(nn.Module):
    """Leaves at one exit, whatever it says."""

    def __init__(self, network: EarlyExitNetwork, number: int) -> None:
        super().__init__()
        self.network = network
        self.number = number

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        def leaves(number: int, logits: Tensor) -> Tensor:
            return torch.full((len(logits),), number == self.number, device=logits.device)

        return self.network.leave(leaves, *args, **kwargs)[0]


class _Splitting(nn.Module):
    """Tries whether later layers can do with a part of the batch."""

    def __init__(self, network: EarlyExitNetwork) -> None:
        super().__init__()
        self.network = network
        self.works = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.works = self.network.can_split(*args, **kwargs)
        return self.network.all_logits(*args, **kwargs)[-1]

    def try_on(self, batches: list[Any], task: Task) -> bool:
        """On the first batch of two or more."""
        batch = next((batch for batch in batches if task.batch_size(batch) > 1), None)
        if batch is not None:
            task.run(self, batch)
        return self.works


def _operations(network: EarlyExitNetwork, task: Task, batch: Any) -> tuple[tuple[float, ...], float]:
    """Operations per sample of leaving at each exit, and of the network alone."""
    samples = task.batch_size(batch)

    def count(part: nn.Module) -> float:
        with FlopCounterMode(display=False) as counter:
            task.run(part, batch)
        return float(counter.get_total_flops()) / samples

    exits = len(network.heads.taps)
    return tuple(count(_LeaveAt(network, number)) for number in range(exits + 1)), count(network.network)


def _warn_of_unused(report: ExitReport) -> None:
    if report.never_taken:
        limits = dict(zip(report.names, report.thresholds, strict=False))
        shown = ", ".join(f"{name!r} (threshold {limits[name]:.4g})" for name in report.never_taken)
        if all(limits[name] == math.inf for name in report.never_taken):
            advice = "Their heads cost operations for nothing: leave them out, or allow a larger loss of accuracy."
        else:
            advice = "Lower their thresholds, or calibrate them with `calibrate_exits`."
        warnings.warn(f"No sample leaves at {shown}. {advice}", stacklevel=3)
