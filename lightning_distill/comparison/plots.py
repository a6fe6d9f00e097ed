"""The comparison as pictures. Figures are made without pyplot, so no backend of the caller is touched."""

from __future__ import annotations

import math
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_distill.comparison.table import label, p_value, scale

if TYPE_CHECKING:
    from lightning_distill.comparison.comparison import Comparison

# Okabe and Ito's colours, which are told apart with every kind of colour vision; the control is grey.
CONTROL = "#666666"
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800")
VERDICTS = {"better": "#009E73", "worse": "#D55E00"}
REFERENCE = "#222222"


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the plots that the comparison has data for; see :meth:`Comparison.plot`."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "results.png": plot_results(comparison),
        "gain.png": plot_gains(comparison),
        "curves.png": plot_curves(comparison),
    }
    written = []
    for name, figure in figures.items():
        if figure is None:
            (folder / name).unlink(missing_ok=True)  # of an earlier state of the comparison
            continue
        figure.savefig(folder / name, dpi=150)
        written.append(folder / name)
    return written


def plot_results(comparison: Comparison) -> Figure:
    """Every run as a dot, the runs of a seed joined by a line, beside them mean and 95 % interval of each method."""
    lines = comparison.summary()
    factor = scale(comparison.metric)
    figure, axes = _figure(comparison, width=max(4.8, 1.8 + 1.3 * len(lines)), height=4.2)
    values = [comparison.values(line.method) for line in lines]
    for seed in sorted({seed for of_method in values for seed in of_method}):
        points = [(x - 0.14, of_method[seed] * factor) for x, of_method in enumerate(values) if seed in of_method]
        axes.plot(*zip(*points, strict=True), color="#bbbbbb", linewidth=0.8, zorder=1)
    for x, (line, of_method) in enumerate(zip(lines, values, strict=True)):
        color = _colors(comparison)[line.method]
        dots = [value * factor for value in of_method.values()]
        axes.scatter([x - 0.14] * len(dots), dots, s=22, color=color, alpha=0.75, linewidths=0, zorder=2)
        half = 0.0 if math.isnan(line.low) else (line.high - line.mean) * factor
        axes.errorbar(
            x + 0.14, line.mean * factor, half, fmt="D", color=color, markersize=6, capsize=4, elinewidth=1.8, zorder=3
        )
    for reference in comparison.references:
        value = float(reference[comparison.metric]) * factor
        axes.axhline(value, color=REFERENCE, linestyle=(0, (4, 3)), linewidth=1, zorder=0)
        axes.annotate(
            str(reference["method"]), (0.995, value), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color=REFERENCE,
        )  # fmt: skip
    axes.set_xlim(-0.5, len(lines) - 0.5)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(lines)), [_wrapped(line.method) for line in lines])
    axes.set_ylabel(label(comparison.metric))
    axes.grid(axis="y", color="#eeeeee")
    _note(
        figure, f"dots: one run each, lines join runs of one seed · diamonds: mean and 95 % interval, n = {_n(lines)}"
    )
    return figure


def plot_gains(comparison: Comparison) -> Figure | None:
    """Mean paired gain of each method over the control with its 95 % interval, against zero."""
    lines = [line for line in comparison.summary() if line.verdict != "control" and line.pairs > 0]
    if not lines:
        return None
    factor = scale(comparison.metric)
    figure, axes = _figure(comparison, width=7.4, height=1.9 + 0.5 * len(lines))
    control = comparison.values(comparison.control)
    sign = -1 if comparison.mode == "min" else 1
    for y, line in enumerate(lines):
        color = VERDICTS.get(line.verdict, CONTROL)
        of_method = comparison.values(line.method)
        dots = [sign * (of_method[seed] - control[seed]) * factor for seed in of_method if seed in control]
        axes.scatter(dots, [y + 0.2] * len(dots), s=14, color=color, alpha=0.45, linewidths=0)
        half = 0.0 if math.isnan(line.gain_low) else (line.gain_high - line.gain) * factor
        axes.errorbar(line.gain * factor, y, xerr=half, fmt="D", color=color, markersize=6, capsize=4, elinewidth=1.8)
        verdict = line.verdict if math.isnan(line.p) else f"{line.verdict}  (p {_compared(line.p)})"
        axes.annotate(
            verdict, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=color,
            annotation_clip=False,
        )  # fmt: skip
    axes.axvline(0, color="#222222", linewidth=1, zorder=1)
    axes.set_yticks(range(len(lines)), [_wrapped(line.method) for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.margins(x=0.08)
    unit = " (percentage points)" if factor == 100 else ""
    direction = ", positive is better" if comparison.mode == "min" else ""
    axes.set_xlabel(f"paired gain in {comparison.metric}{unit} over {comparison.control}{direction}")
    axes.grid(axis="x", color="#eeeeee")
    note = f"dots: one seed each · diamonds: mean and 95 % interval, n = {_n(lines)}"
    several = sum(not math.isnan(line.p) for line in lines) > 1
    _note(figure, note + (f" · p not corrected for {len(lines)} comparisons" if several else ""))
    return figure


def plot_curves(comparison: Comparison) -> Figure | None:
    """Validation metric by epoch, mean over the seeds, with a band of one standard deviation."""
    metric = comparison.metric.replace("test", "val", 1)
    factor = scale(metric)
    curves = {method: _by_epoch(comparison, method, metric) for method in comparison.methods}
    if not any(len(curve) > 1 for curve in curves.values()):
        return None
    figure, axes = _figure(comparison, width=6.8, height=4.2)
    colors = _colors(comparison)
    for method, curve in curves.items():
        epochs = sorted(curve)
        means = [fmean(curve[epoch]) * factor for epoch in epochs]
        spreads = [stdev(curve[epoch]) * factor if len(curve[epoch]) > 1 else 0.0 for epoch in epochs]
        axes.plot(epochs, means, color=colors[method], linewidth=1.8, label=method)
        low, high = (
            zip(*((m - s, m + s) for m, s in zip(means, spreads, strict=True)), strict=True) if epochs else ((), ())
        )
        axes.fill_between(epochs, low, high, color=colors[method], alpha=0.15, linewidth=0)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#eeeeee")
    axes.legend(frameon=False)
    _note(figure, "lines: mean over the seeds · bands: ± one standard deviation")
    return figure


def _figure(comparison: Comparison, *, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if comparison.title:
        axes.set_title(textwrap.fill(comparison.title, int(10 * width)), loc="left", fontsize=11, fontweight="bold")
    return figure, axes


def _note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8, color="#777777")


def _colors(comparison: Comparison) -> dict[str, str]:
    others = [method for method in comparison.methods if method != comparison.control]
    return {comparison.control: CONTROL, **{name: COLORS[i % len(COLORS)] for i, name in enumerate(others)}}


def _by_epoch(comparison: Comparison, method: str, metric: str) -> dict[int, list[float]]:
    """Values of all seeds by epoch, counted from 1; the last validation of an epoch counts."""
    values: dict[int, list[float]] = defaultdict(list)
    for seed in comparison.values(method):
        rows = {row["epoch"]: row[metric] for row in comparison.history(method, seed) if row.get(metric) is not None}
        for epoch, value in rows.items():
            values[epoch + 1].append(value)
    return values


def _n(lines: Sequence[object]) -> str:
    counts = sorted({getattr(line, "pairs", 0) or getattr(line, "n", 0) for line in lines})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _compared(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _wrapped(name: str) -> str:
    """Long names on two lines, broken at the space nearest the middle."""
    if len(name) <= 14 or " " not in name:
        return name
    spaces = [i for i, character in enumerate(name) if character == " "]
    middle = min(spaces, key=lambda i: abs(i - len(name) / 2))
    return f"{name[:middle]}\n{name[middle + 1 :]}"
