"""A search as pictures, made without pyplot."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_distill.comparison.table import label, scale
from lightning_distill.search.result import Search, Trial, short_names, shown

BLUE, ORANGE, GREY, GREEN = "#0072B2", "#E69F00", "#999999", "#009E73"


def write_plots(search: Search) -> list[Path]:
    """Write the plots that the search has data for; see :meth:`Search.plot`."""
    figures = {
        "history.png": plot_history(search),
        "settings.png": plot_settings(search),
        "front.png": plot_front(search),
    }
    written = []
    for name, figure in figures.items():
        path = search.folder / name
        if figure is None:
            path.unlink(missing_ok=True)
            continue
        temporary = path.with_name(f".{name}.tmp")  # another process may be at it
        figure.savefig(temporary, dpi=150, format="png")
        temporary.replace(path)
        written.append(path)
    return written


def plot_history(search: Search) -> Figure | None:
    """Each trial's metric by its number, with the best so far; one panel per metric."""
    if not search.complete:
        return None
    figure = Figure(figsize=(6.8, 1.2 + 2.8 * len(search.metrics)), layout="constrained")
    panels = figure.subplots(len(search.metrics), 1, sharex=True, squeeze=False)[:, 0]
    for k, (axes, metric, mode) in enumerate(zip(panels, search.metrics, search.modes, strict=True)):
        factor = scale(metric)
        done = [(trial.number, trial.values[k] * factor) for trial in search.complete]
        axes.scatter(
            [n for n, _ in done], [v for _, v in done], s=26, color=BLUE, linewidths=0, label="complete", zorder=3
        )
        pruned = [t for t in search.trials if t.state == "pruned" and len(t.values) > k]
        if pruned:
            xs, ys = [t.number for t in pruned], [t.values[k] * factor for t in pruned]
            axes.scatter(xs, ys, s=26, marker="x", color=ORANGE, label="pruned, where it stopped", zorder=2)
        better = max if mode == "max" else min
        line: list[float] = []
        for _, value in done:
            line.append(better(line[-1], value) if line else value)
        axes.step([n for n, _ in done], line, where="post", color=GREEN, linewidth=1.6, label="best so far", zorder=1)
        for trial in (t for t in search.trials if t.state == "failed"):
            axes.axvline(trial.number, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_ylabel(label(metric))
        _tidy(axes)
    panels[0].legend(frameon=False, fontsize=8.5, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    panels[-1].set_xlabel("trial")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    failed = any(trial.state == "failed" for trial in search.trials)
    _head(figure, search, "validation metric after the last epoch" + (" · dotted: failed" if failed else ""))
    return figure


def plot_settings(search: Search) -> Figure | None:
    """The (first) metric against each setting, with the setting's importance where it is known."""
    names = list(search.trials[0].settings) if search.trials else []
    if not search.complete or not names:
        return None
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(max(3.2 * columns, 5.0), 1.2 + 2.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    metric, short = search.metrics[0], short_names(names)
    newest = max(trial.number for trial in search.trials)
    for axes, name in zip(panels, names, strict=False):
        places = _places(search.complete, name)
        heights = [trial.values[0] * scale(metric) for trial in search.complete]
        ages = [trial.number / max(newest, 1) for trial in search.complete]
        axes.scatter(list(places.values()), heights, c=ages, cmap="viridis", vmin=0, vmax=1, s=24, linewidths=0)
        best = search.best
        axes.scatter(
            [places[best.number]], [best.values[0] * scale(metric)], s=90, facecolors="none", edgecolors=ORANGE,
            linewidths=1.6,
        )  # fmt: skip
        _set_axis(axes, [trial.settings[name] for trial in search.complete])
        importance = search.importances.get(name)
        axes.set_title(short[name] + ("" if importance is None else f"  ·  importance {importance:.2f}"), fontsize=9.5)
        _tidy(axes)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supylabel(label(metric), fontsize=9.5)
    _head(figure, search, "dots: complete trials, from the first (dark) to the last (light) · ring: the best")
    return figure


def plot_front(search: Search) -> Figure | None:
    """The first metric against the second, with the Pareto front; ``None`` unless there are two or more."""
    if len(search.metrics) < 2 or not search.complete:
        return None
    figure = Figure(figsize=(6.2, 4.6), layout="constrained")
    axes = figure.add_subplot()
    first, second = search.metrics[:2]
    xs, ys = ([t.values[k] * scale(metric) for t in search.complete] for k, metric in enumerate((first, second)))
    axes.scatter(xs, ys, s=26, color=GREY, linewidths=0, label="complete trials")
    front = sorted((t.values[0] * scale(first), t.values[1] * scale(second), t.number) for t in search.front)
    axes.plot(
        [x for x, _, _ in front], [y for _, y, _ in front], "o-", color=BLUE, label="not dominated", linewidth=1.2
    )
    for x, y, trial in front:
        axes.annotate(str(trial), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8, color=BLUE)
    directions = [("more" if mode == "max" else "less") + " is better" for mode in search.modes]
    axes.set_xlabel(f"{label(first)}, {directions[0]}")
    axes.set_ylabel(f"{label(second)}, {directions[1]}")
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    _tidy(axes)
    _head(figure, search, "numbers: trials")
    return figure


def _places(trials: list[Trial], name: str) -> dict[int, Any]:
    """Where each trial stands on the axis of a setting."""
    values = [trial.settings[name] for trial in trials]
    if _numeric(values):
        return {trial.number: trial.settings[name] for trial in trials}
    order = sorted({shown(value) for value in values})
    return {trial.number: order.index(shown(trial.settings[name])) for trial in trials}


def _set_axis(axes: Axes, values: list[Any]) -> None:
    if not _numeric(values):
        order = sorted({shown(value) for value in values})
        axes.set_xticks(range(len(order)), [textwrap.shorten(text, 16, placeholder="…") for text in order])
        axes.margins(x=0.25)
    elif min(values) > 0 and max(values) / min(values) > 30:
        axes.set_xscale("log")


def _numeric(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(color="#eeeeee")


def _head(figure: Figure, search: Search, note: str) -> None:
    if search.title:
        width = int(13 * figure.get_figwidth())
        figure.suptitle(textwrap.fill(search.title, width), x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supxlabel(note, fontsize=8, color="#777777")
