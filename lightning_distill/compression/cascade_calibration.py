"""Thresholds of a cascade from validation data, and what they do on other data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor, nn

from lightning_distill.compression.cascade import Escalate, PrecisionCascade, pass_costs
from lightning_distill.compression.exit_calibration import ask_exits, first_and_all
from lightning_distill.compression.exit_rules import ExitReport, choose_thresholds, curve_thresholds, exit_report
from lightning_distill.hardware.bit_operations import bit_operations
from lightning_distill.outputs import Outputs
from lightning_distill.tasks import Classification, Task


@dataclass(frozen=True)
class CascadeMeasurements:
    """What every network of a cascade says about some data.

    Attributes:
        confidences: That decide who answers, of all networks but the last, shape ``(N, M - 1)``; where the first
            chooses, its own in every column.
        correct: Whether each network is right, boolean, shape ``(N, M)``.
        costs: Of one pass of each network, per sample.
        bits: Of a weight of each.
        names: Of the networks.
        escalate: See :class:`~lightning_distill.compression.PrecisionCascade`.
        unit: Of the costs.
    """

    confidences: Tensor
    correct: Tensor
    costs: tuple[float, ...]
    bits: tuple[float, ...]
    names: tuple[str, ...]
    escalate: Escalate
    unit: str

    def report(self, thresholds: Sequence[float]) -> ExitReport:
        """What these thresholds do. Whoever goes on pays for the earlier passes too, so the cost may be above 100 %."""
        costs = pass_costs(self.costs, thresholds, self.escalate)
        report = exit_report(
            self.confidences, self.correct, costs, thresholds, full_cost=self.costs[-1], names=self.names
        )
        return replace(report, whole="last network", unit=self.unit, bits=self.bits)

    def curve(self, points: int = 25) -> list[ExitReport]:
        """Accuracy against cost, from everybody at the first network to everybody through all of them.

        With one threshold for all networks, which are as sure in different ways: :meth:`choose` does better. The last
        network alone is in :meth:`alone`.
        """
        width = self.confidences.shape[1]
        return [self.report([threshold] * width) for threshold in curve_thresholds(self.confidences, points)[:-1]]

    def alone(self) -> dict[str, ExitReport]:
        """Each network on all samples, without a cascade: what the cascade has to be better than."""
        found = {}
        for number, name in enumerate(self.names):
            one = replace(
                self,
                confidences=self.confidences[:, :0],
                correct=self.correct[:, [number]],
                costs=(self.costs[number],),
            )
            report = replace(one, bits=(self.bits[number],), names=(name,)).report([])
            last = self.correct[:, -1].double().mean().item()
            found[name] = replace(report, full_cost=self.costs[-1], full_accuracy=last)
        return found

    def choose(self, *, max_drop: float | None = None, max_cost: float | None = None) -> list[float]:
        """Thresholds for the least cost at an accuracy, or for the best accuracy at a cost, on these samples.

        Every choice of networks that are run at all is tried, so the last one alone is never cheaper at its accuracy.

        Args:
            max_drop: Accuracy that may be lost against the last network, in [0, 1].
            max_cost: Cost per sample that may be spent, in the unit of ``costs``. Exactly one of the two.

        Raises:
            ValueError: As :func:`~lightning_distill.compression.choose_thresholds`.
        """
        if (max_drop is None) == (max_cost is None):
            raise ValueError(f"Give exactly one of `max_drop` and `max_cost`, got {max_drop} and {max_cost}.")
        width = self.confidences.shape[1]
        found = [[math.inf] * width] if max_cost is None or self.costs[-1] <= max_cost else []
        # One that nobody asks must not be paid for, so which ones are run changes what all the others cost.
        for used in _choices(width, self.escalate):
            kept = [number for number in range(width) if used[number]]
            costs = pass_costs(self.costs, [0.0 if use else math.inf for use in used], self.escalate)
            if max_cost is not None and min(costs[number] for number in kept) > max_cost:
                continue
            chosen = choose_thresholds(
                self.confidences[:, kept],
                self.correct[:, [*kept, width]],
                [costs[number] for number in [*kept, width]],
                max_drop=max_drop,
                max_cost=max_cost,
            )
            places = dict(zip(kept, chosen, strict=True))
            found.append([places.get(number, math.inf) for number in range(width)])
        if not found:
            raise ValueError(
                f"`max_cost` is {max_cost:g} per sample, but the cheapest network takes {min(self.costs):g}."
            )
        reports = [self.report(thresholds) for thresholds in found]
        values = [(-r.cost, r.accuracy) if max_cost is None else (r.accuracy, -r.cost) for r in reports]
        return found[values.index(max(values))]


def measure_cascade(
    cascade: PrecisionCascade, batches: Iterable[Any], *, task: Task | None = None
) -> CascadeMeasurements:
    """Ask every network about every labelled sample.

    Args:
        cascade: The networks.
        batches: Labelled batches, such as a data loader.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Raises:
        ValueError: If there is no labelled sample.
        TypeError: If ``task`` is one without classes, or one whose items are tokens.
    """
    task = Classification() if task is None else task
    first, batches = first_and_all(batches)
    confidences, correct = ask_exits(_Everybody(cascade), batches, task, cascade.criterion)
    if cascade.escalate == "direct":
        confidences = confidences[:, :1].expand_as(confidences)
    costs = cascade.costs
    if costs is None:
        samples = task.batch_size(first)
        costs = tuple(bit_operations(network, first, run=task.run) / samples for network in cascade.networks)
    unit = "bit operations" if cascade.costs is None else "cost"
    return CascadeMeasurements(confidences, correct, costs, cascade.bits, cascade.names, cascade.escalate, unit)


def calibrate_cascade(
    cascade: PrecisionCascade,
    batches: Iterable[Any],
    *,
    max_drop: float | None = None,
    max_cost: float | None = None,
    task: Task | None = None,
) -> ExitReport:
    """Set the thresholds of ``cascade`` to what is best on ``batches``.

    Args:
        cascade: Changed in place.
        batches: Labelled *validation* batches, such as a data loader.
        max_drop: Accuracy that may be lost against the last network, in [0, 1]: the least cost is sought.
        max_cost: Mean cost that may be spent, as a share of the last network's: the best accuracy is sought. Exactly
            one of the two.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Returns:
        What the thresholds do on ``batches``. They were chosen there, so it is a little too good:
        :func:`evaluate_cascade` measures on other data.

    Raises:
        ValueError: If not exactly one goal is given, one is outside its range or cannot be met, and as
            :func:`measure_cascade`.
    """
    if max_cost is not None and not max_cost > 0:
        raise ValueError(f"`max_cost`, a share of the last network's cost, must be positive, got {max_cost}.")
    measured = measure_cascade(cascade, batches, task=task)
    limit = None if max_cost is None else max_cost * measured.costs[-1]
    cascade.thresholds = measured.choose(max_drop=max_drop, max_cost=limit)
    return measured.report(cascade.thresholds)


def evaluate_cascade(cascade: PrecisionCascade, batches: Iterable[Any], *, task: Task | None = None) -> ExitReport:
    """What the present thresholds of ``cascade`` do on ``batches``, such as test data.

    Raises:
        ValueError: As :func:`measure_cascade`.
    """
    return measure_cascade(cascade, batches, task=task).report(cascade.thresholds)


class _Everybody(nn.Module):
    """Says what all networks say, as outputs with the logits of all but the last as features."""

    def __init__(self, cascade: PrecisionCascade) -> None:
        super().__init__()
        self.cascade = cascade

    def forward(self, *args: Any, **kwargs: Any) -> Outputs:
        *earlier, last = self.cascade.all_logits(*args, **kwargs)
        return Outputs(last, features={str(number): said for number, said in enumerate(earlier)})


def _choices(width: int, escalate: Escalate) -> list[tuple[bool, ...]]:
    """Which of the networks before the last are run; where the first chooses, all may answer."""
    if escalate == "direct":
        return [(True,) * width]
    return [used for used in product((True, False), repeat=width) if any(used)]
