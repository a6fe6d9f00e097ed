"""Accuracy-against-cost curves of early exits and cascades as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_distill.compression.exit_rules import ExitReport

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = ("*", "s", "D", "^", "v", "P", "X")


def plot_exit_curve(curve: Sequence[ExitReport], path: str | Path, *, chosen: ExitReport | None = None) -> None:
    """Draw accuracy against cost, relative to the whole network's, into a PNG file.

    Args:
        curve: Points, as :func:`~lightning_distill.compression.exit_curve` gives them; at least one.
        path: Of the picture.
        chosen: A point to mark: the calibrated thresholds, on the same data.

    Raises:
        ValueError: If ``curve`` is empty.
    """
    marks = {} if chosen is None else {"calibrated": chosen}
    plot_exit_curves({"one threshold for all exits": curve}, path, marks=marks)


def plot_exit_curves(
    curves: Mapping[str, Sequence[ExitReport]],
    path: str | Path,
    *,
    marks: Mapping[str, ExitReport] | None = None,
) -> None:
    """Draw several curves of accuracy against cost on the same axes into a PNG file: early exits beside a cascade.

    Each cost is relative to that of its own curve's whole network, so the curves say the same only if these are the
    same network, or as good and as expensive.

    Args:
        curves: Points of each curve by its name; at least one each.
        path: Of the picture.
        marks: Single points by name, such as calibrated thresholds or one network alone.

    Raises:
        ValueError: If there is no curve, or one without a point.
    """
    if not curves or not all(curves.values()):
        raise ValueError("`curves` holds no point to draw.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    wholes: dict[float, str] = {}
    for (name, curve), colour in zip(curves.items(), _cycle(COLOURS, len(curves)), strict=True):
        points = sorted(curve, key=lambda point: point.relative_cost)
        costs, accuracies = [100 * p.relative_cost for p in points], [100 * p.accuracy for p in points]
        axes.plot(costs, accuracies, marker="o", markersize=4, color=colour, label=name)
        wholes.setdefault(
            points[0].full_accuracy, points[0].whole if len(curves) == 1 else f"{points[0].whole}: {name}"
        )
    for (accuracy, name), style in zip(wholes.items(), _cycle(("--", ":", "-."), len(wholes)), strict=True):
        axes.axhline(100 * accuracy, color="0.5", linestyle=style, label=name)
    axes.axvline(100, color="0.8", linewidth=1)
    named = marks or {}
    for (name, mark), shape in zip(named.items(), _cycle(MARKS, len(named)), strict=True):
        size = 13 if shape == "*" else 7
        colour = "red" if shape == "*" else "0.2"
        axes.plot(100 * mark.relative_cost, 100 * mark.accuracy, shape, color=colour, markersize=size, label=name)
    first = next(iter(curves.values()))[0]
    units = list(dict.fromkeys(curve[0].unit for curve in curves.values()))
    axes.set_xlabel(f"{' or '.join(units)} per sample, % of the {first.whole if len(curves) == 1 else 'largest'}'s")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"Accuracy against cost, {first.samples} samples")
    axes.legend(loc="best", fontsize="small")
    axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _cycle(values: Sequence[str], count: int) -> list[str]:
    return [values[number % len(values)] for number in range(count)]
