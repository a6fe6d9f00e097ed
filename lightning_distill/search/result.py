"""What a search found."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lightning_distill.comparison.table import duration, label, number
from lightning_distill.files import write_json, write_text

State = Literal["complete", "pruned", "failed", "running"]
RESULTS = "results.json"
TABLE = "results.csv"


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        number: From 0.
        state: ``"complete"``, ``"pruned"`` (hopeless, or its student costs too much), ``"failed"`` (a loss was not
            finite) or ``"running"``.
        settings: By dotted path.
        values: Validation metrics, means over the seeds; a pruned trial has the first, where it stopped; or none.
        seconds: Duration of its trainings.
        steps: Validations that were reported to the pruner.
        note: Why it failed, or what was over a limit.
    """

    number: int
    state: State
    settings: dict[str, Any]
    values: tuple[float, ...] = ()
    seconds: float = math.nan
    steps: int = 0
    note: str = ""


@dataclass(frozen=True)
class Search:
    """All trials of a search. ``rich.print`` shows the best of them.

    Attributes:
        folder: Where everything is.
        metrics: Names of the validation metrics, the first of which decides about pruning.
        modes: ``"max"`` or ``"min"`` for each.
        seeds: Of the trainings of each trial.
        trials: In the order of their numbers.
        title: Heading of table and plots.
        importances: Share of each setting in what makes trials good, by dotted path; empty where there are too few.
    """

    folder: Path
    metrics: tuple[str, ...]
    modes: tuple[str, ...]
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]
    title: str = ""
    importances: dict[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> list[Trial]:
        """Trials that were trained to their end."""
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def best(self) -> Trial:
        """The best complete trial; the first of the front if there are several metrics.

        Raises:
            ValueError: If no trial is complete.
        """
        ranked = self.ranked()
        if not ranked:
            raise ValueError(f"None of the {len(self.trials)} trials is complete, so that none is the best.")
        return ranked[0]

    @property
    def front(self) -> list[Trial]:
        """Complete trials than which none is at least as good in each metric and better in one (the Pareto front)."""
        costs = {trial.number: self._costs(trial) for trial in self.complete}

        def dominated(cost: tuple[float, ...]) -> bool:
            return any(
                other != cost and all(o <= c for o, c in zip(other, cost, strict=True)) for other in costs.values()
            )

        return sorted(
            (trial for trial in self.complete if not dominated(costs[trial.number])),
            key=lambda trial: (costs[trial.number], trial.number),
        )

    def ranked(self) -> list[Trial]:
        """Complete trials, the best first: by the metric or, with several, the front before the rest."""
        front = {trial.number for trial in self.front} if len(self.metrics) > 1 else set()
        return sorted(self.complete, key=lambda trial: (trial.number not in front, self._costs(trial), trial.number))

    def table(self, rows: int = 10) -> Table:
        """The best trials, one per row."""
        table = Table(title=self.title or None, caption=self._caption(), caption_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("trial", justify="right")
        for metric in self.metrics:
            table.add_column(label(metric), justify="right", overflow="fold")
        names = list(self.trials[0].settings) if self.trials else []
        for short in short_names(names).values():
            table.add_column(short, justify="right", overflow="fold")
        table.add_column("seeds", justify="right")
        table.add_column("time", justify="right")
        front = {trial.number for trial in self.front} if len(self.metrics) > 1 else set()
        for trial in self.ranked()[:rows]:
            values = [number(value, metric) for value, metric in zip(trial.values, self.metrics, strict=True)]
            settings = [shown(trial.settings[name]) for name in names]
            seeds = ", ".join(map(str, self.seeds))
            style = "bold" if trial.number in front else ""
            table.add_row(str(trial.number), *values, *settings, seeds, duration(trial.seconds), style=style)
        return table

    def save(self) -> None:
        """Write ``results.json`` and ``results.csv`` into the folder."""
        content = {
            "metrics": list(self.metrics),
            "modes": list(self.modes),
            "seeds": list(self.seeds),
            "importances": self.importances,
            "best": [trial.number for trial in self.ranked()[:10]],
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_json(self.folder / RESULTS, content)
        text = io.StringIO()
        names = list(self.trials[0].settings) if self.trials else []
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["trial", "state", *self.metrics, *names, "seconds"])
        for trial in self.trials:
            values = [*trial.values, *[""] * (len(self.metrics) - len(trial.values))]
            writer.writerow(
                [
                    trial.number,
                    trial.state,
                    *values,
                    *(shown(trial.settings.get(name)) for name in names),
                    trial.seconds,
                ]
            )
        write_text(self.folder / TABLE, text.getvalue())

    def plot(self) -> list[Path]:
        """Write ``history.png``, ``settings.png`` and, for two metrics, ``front.png``; return what was written."""
        from lightning_distill.search.plots import write_plots

        return write_plots(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def _costs(self, trial: Trial) -> tuple[float, ...]:
        signs = (-1 if mode == "max" else 1 for mode in self.modes)
        return tuple(sign * value for sign, value in zip(signs, trial.values, strict=True))

    def _caption(self) -> str:
        counts = {
            state: sum(trial.state == state for trial in self.trials) for state in ("pruned", "failed", "running")
        }
        listed = ", ".join(f"{count} {state}" for state, count in counts.items() if count > 0)
        trials = _several(len(self.trials), "trial") + (f" ({listed})" if listed else "")
        sentences = [
            f"The best of {trials} by {' and '.join(self.metrics)} after the last epoch, mean over "
            f"{_several(len(self.seeds), 'seed')}.",
            "The best of many is lucky as well as good: on new seeds and on test data it will be worse than here.",
        ]
        if len(self.metrics) > 1:
            sentences.append("Bold: no other trial is better in one metric and as good in the others.")
        return " ".join(sentences)


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each dotted path's last parts, as many as tell it from the others.

    Example:
        >>> short_names(["model.init_args.optimizer.init_args.lr", "model.init_args.alpha"])
        {'model.init_args.optimizer.init_args.lr': 'lr', 'model.init_args.alpha': 'alpha'}
    """
    short: dict[str, str] = {}
    for name in names:
        parts = [part for part in name.split(".") if part != "init_args"]
        for length in range(1, len(parts) + 1):
            candidate = ".".join(parts[-length:])
            others = [[part for part in other.split(".") if part != "init_args"] for other in names if other != name]
            if all(".".join(other[-length:]) != candidate for other in others):
                break
        short[name] = candidate
    return short


def shown(value: Any) -> str:
    """A setting as the table shows it."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rsplit(".", 1)[-1]
    return str(value)
