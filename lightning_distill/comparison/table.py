"""The comparison as a table to read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_distill.comparison.statistics import MethodSummary

if TYPE_CHECKING:
    from lightning_distill.comparison.comparison import Comparison

PERCENTAGES = ("accuracy", "agreement", "ece")
COLORS = {"better": "bold green", "worse": "bold red", "diverged": "bold red"}
NOT_AVAILABLE = "n/a"


# What stands in one column, one above the other, where the lines would be too long.
COLUMNS = (("method",), ("value", "n"), ("gain", "interval"), ("t", "p", "holm"), ("verdict",), ("size", "time"))
LEFT = ("method", "verdict")


def make_table(comparison: Comparison, *, width: float = math.inf) -> Table:
    """One row per reference and method; what was tested stands in the caption.

    Args:
        comparison: What to show.
        width: Characters that there is room for; with fewer than the table needs, related numbers stand one above the
            other.
    """
    lines = comparison.summary()
    headings = _headings(comparison, lines)
    rows = [(_reference_cells(run, comparison.metric), "dim") for run in comparison.references]
    rows += [(_cells(line, comparison.metric), "") for line in lines]
    flat = [(name,) for column in COLUMNS for name in column if name in headings]
    stacked = [tuple(name for name in column if name in headings) for column in COLUMNS]
    table = _layout(flat, headings, rows)
    if Console().measure(table, options=Console().options.update(max_width=10_000)).maximum > width:
        table = _layout(stacked, headings, rows)
        table.show_lines, table.box = True, box.HORIZONTALS
    table.title = comparison.title or None
    table.caption = caption(comparison, lines)
    return table


def _layout(
    columns: Sequence[tuple[str, ...]], headings: dict[str, str], rows: Sequence[tuple[dict[str, Text], str]]
) -> Table:
    table = Table(caption_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True)
    for column in columns:
        heading = "\n".join(headings[name] for name in column)
        wraps = column[0] in LEFT
        table.add_column(
            Text(heading), justify="left" if wraps else "right", no_wrap=not wraps, min_width=10 if wraps else None
        )
    for cells, style in rows:
        table.add_row(*(Text("\n").join(cells[name] for name in column) for column in columns), style=style)
    return table


def _headings(comparison: Comparison, lines: Sequence[MethodSummary]) -> dict[str, str]:
    """Heading of each column; Holm's correction has one where there is something to correct."""
    headings = {
        "method": "method",
        "n": "n",
        "value": "mean ± sd",
        "gain": "paired gain",
        "interval": "95 % CI",
        "t": "t",
        "p": "p",
        "holm": "p (Holm)",
        "verdict": "verdict",
        "size": "parameters",
        "time": "time",
    }
    if sum(not math.isnan(line.p) for line in lines) < 2:
        del headings["holm"]
    return headings


def _reference_cells(run: Mapping[str, Any], metric: str) -> dict[str, Text]:
    cells = {
        "method": str(run["method"]),
        "n": "1",
        "value": number(float(run[metric]), metric),
        "verdict": "reference",
        "size": count(run["parameters"]),
        "time": duration(run["seconds"]),
    }
    return defaultdict(Text, {name: Text(cell) for name, cell in cells.items()})


def _cells(line: MethodSummary, metric: str) -> dict[str, Text]:
    spread = "" if math.isnan(line.sd) else f" ± {number(line.sd, metric)}"
    low, high = (number(end, metric, sign=True) for end in (line.gain_low, line.gain_high))
    cells = {
        "method": line.method,
        "n": str(line.n),
        "value": number(line.mean, metric) + spread,
        "gain": number(line.gain, metric, sign=True),
        "interval": NOT_AVAILABLE if math.isnan(line.gain_low) else f"[{low}, {high}]",
        "t": NOT_AVAILABLE if math.isnan(line.t) else f"{line.t:.2f}",
        "p": p_value(line.p),
        "holm": p_value(line.p_holm),
        "size": count(line.parameters),
        "time": duration(line.seconds),
    }
    if line.verdict == "control":
        cells |= dict.fromkeys(("gain", "interval", "t", "p", "holm"), "")
    texts = {name: Text(cell) for name, cell in cells.items()}
    return texts | {"verdict": Text(line.verdict, style=COLORS.get(line.verdict, ""))}


def caption(comparison: Comparison, lines: Sequence[MethodSummary]) -> str:
    """What was tested on what, how often, and what to beware of."""
    others = [line for line in lines if line.verdict != "control"]
    tested = [line for line in others if not math.isnan(line.p)]
    sentences = [f"{label(comparison.metric)} on the test data, weights of the last epoch (none was selected)."]
    if tested:
        pairs = sorted({line.pairs for line in tested})
        n = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
        sentences.append(
            f"Paired t-test (two-sided) against {comparison.control!r} on the same seeds, n = {n}; better or worse: "
            "the 95 % interval excludes 0."
        )
    elif others:
        sentences.append("No test: it needs two seeds or more, and gains that are not all alike.")
    if comparison.mode == "min":
        sentences.append(f"Less {comparison.metric} is better; a positive gain is an improvement.")
    if len(tested) > 1:
        sentences.append(f"p and the intervals are not corrected for the {len(tested)} comparisons; p (Holm) is.")
    steps = {line.method: line.steps for line in lines}
    if len(set(steps.values())) > 1:
        listed = ", ".join(f"{method} {step:.0f}" for method, step in steps.items())
        sentences.append(f"Not the same number of optimizer steps: {listed}.")
    return " ".join(sentences)


def is_percentage(metric: str) -> bool:
    """Whether ``metric`` is a fraction that people read in percent."""
    return metric.rsplit("/", 1)[-1] in PERCENTAGES


def label(metric: str) -> str:
    """``metric`` with its unit."""
    return f"{metric} (%)" if is_percentage(metric) else metric


def scale(metric: str) -> float:
    """Factor from the metric to the number that is shown."""
    return 100.0 if is_percentage(metric) else 1.0


def number(value: float, metric: str, *, sign: bool = False) -> str:
    """``value`` of ``metric`` as it is shown."""
    if math.isnan(value):
        return NOT_AVAILABLE
    decimals = 2 if is_percentage(metric) else 4
    return f"{value * scale(metric):{'+' if sign else ''}.{decimals}f}"


def p_value(p: float) -> str:
    """Three decimals, and no claim to know smaller ones."""
    return NOT_AVAILABLE if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(value: float) -> str:
    """A number of parameters.

    Example:
        >>> [count(n) for n in (650, 7306, 60_000, 1_250_000)]
        ['650', '7.3 k', '60.0 k', '1.2 M']
    """
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """A time.

    Example:
        >>> [duration(s) for s in (0.42, 12.3, 150, 7300)]
        ['0.4 s', '12 s', '2 min 30 s', '2 h 01 min']
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
