"""The result of a comparison: runs in, summary, table, plots and files out."""

from __future__ import annotations

import csv
import io
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch

from lightning_distill.comparison.files import RESULTS, TABLE, run_folder
from lightning_distill.comparison.runs import run_history
from lightning_distill.comparison.statistics import (
    NAN,
    MethodSummary,
    PairedGain,
    holm,
    mean_interval,
    paired_gain,
)
from lightning_distill.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

Goal = Literal["max", "min"]


@dataclass(frozen=True)
class Comparison:
    """Methods × seeds, measured against a control group.

    Attributes:
        folder: Where the runs are.
        control: Name of the method that the others are compared with.
        metric: What is compared.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        runs: One mapping per method and seed: ``method``, ``seed``, all test metrics, ``parameters``, ``steps``,
            ``seconds``, ``cpu_seconds``.
        references: The same for what was trained once and is shown without statistics (a teacher, say).
        title: Heading of table and plots.
    """

    folder: Path
    control: str
    metric: str
    mode: Goal
    runs: Sequence[Mapping[str, Any]]
    references: Sequence[Mapping[str, Any]] = ()
    title: str = ""

    @property
    def methods(self) -> list[str]:
        """Names of the methods that have runs, the control first."""
        names = list(dict.fromkeys(str(run["method"]) for run in self.runs))
        return sorted(names, key=lambda name: name != self.control)

    def values(self, method: str, metric: str | None = None) -> dict[int, float]:
        """Value of ``metric`` (by default the one that is compared) by seed.

        Raises:
            ValueError: If a run has no such metric.
        """
        metric = self.metric if metric is None else metric
        runs = [run for run in self.runs if run["method"] == method]
        for run in runs:
            check_metric(run, metric)
        return {int(run["seed"]): float(run[metric]) for run in runs}

    def gain(self, method: str, metric: str | None = None, mode: Goal | None = None) -> PairedGain:
        """Paired gain of ``method`` over the control on the seeds that both have; positive is better."""
        values, control = self.values(method, metric), self.values(self.control, metric)
        seeds = [seed for seed in values if seed in control]
        sign = -1 if (mode or self.mode) == "min" else 1
        return paired_gain([sign * values[seed] for seed in seeds], [sign * control[seed] for seed in seeds])

    def summary(self, metric: str | None = None, mode: Goal | None = None) -> list[MethodSummary]:
        """One line per method, the control first.

        Args:
            metric: Another metric than the one that is compared.
            mode: Whether more or less of it is better; by default as for the one that is compared.

        Raises:
            ValueError: If a run has no such metric.
        """
        others = [method for method in self.methods if method != self.control]
        gains = {method: self.gain(method, metric, mode) for method in others}
        corrected = dict(zip(others, holm([gains[method].p for method in others]), strict=True))
        return [self._line(method, metric, gains.get(method), corrected.get(method, NAN)) for method in self.methods]

    def _line(self, method: str, metric: str | None, gain: PairedGain | None, p_holm: float) -> MethodSummary:
        runs = [run for run in self.runs if run["method"] == method]
        values = mean_interval(list(self.values(method, metric).values()))
        return MethodSummary(
            method=method,
            n=values.n,
            mean=values.mean,
            sd=values.sd,
            low=values.low,
            high=values.high,
            gain=NAN if gain is None else gain.gain,
            gain_low=NAN if gain is None else gain.low,
            gain_high=NAN if gain is None else gain.high,
            t=NAN if gain is None else gain.t,
            p=NAN if gain is None else gain.p,
            p_holm=p_holm,
            pairs=0 if gain is None else gain.pairs,
            verdict="control" if gain is None else gain.verdict,
            parameters=int(runs[0]["parameters"]),
            steps=_mean(runs, "steps"),
            seconds=_mean(runs, "seconds"),
            cpu_seconds=_mean(runs, "cpu_seconds"),
        )

    def history(self, method: str, seed: int) -> list[dict[str, Any]]:
        """Validation metrics of a run, one mapping per validation: ``epoch``, ``step`` and the metrics."""
        return run_history(run_folder(self.folder, method, seed))

    def table(self, width: float = math.inf) -> Table:
        """The summary as a rich table, with what was tested below it.

        Args:
            width: Characters that there is room for; in a narrow table related numbers stand one above the other.
        """
        from lightning_distill.comparison.table import make_table

        return make_table(self, width=width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(options.max_width)

    def plot(self, folder: str | Path | None = None) -> list[Path]:
        """Write the plots as PNG files.

        Args:
            folder: Where; by default the folder of the comparison.

        Returns:
            The files: ``results.png`` (every run), ``gain.png`` (paired gains with their 95 % intervals, if there is
            a method besides the control) and ``curves.png`` (the metric on the validation data by epoch, if the
            modules log it as ``val/...`` where the test metric is ``test/...``).
        """
        from lightning_distill.comparison.plots import write_plots

        return write_plots(self, self.folder if folder is None else Path(folder))

    def save(self) -> None:
        """Write ``results.json`` and ``results.csv`` to the folder."""
        write_json(
            self.folder / RESULTS,
            {
                "title": self.title,
                "control": self.control,
                "metric": self.metric,
                "mode": self.mode,
                "runs": self.runs,
                "references": self.references,
                "summary": [asdict(line) for line in self.summary()],
                "environment": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "lightning": L.__version__,
                },
            },
        )
        write_text(self.folder / TABLE, self._csv())

    def _csv(self) -> str:
        rows = [{"role": "control" if run["method"] == self.control else "method", **run} for run in self.runs]
        rows += [{"role": "reference", **run} for run in self.references]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    @classmethod
    def load(cls, folder: str | Path) -> Comparison:
        """The comparison that :meth:`save` wrote to ``folder``.

        Raises:
            FileNotFoundError: If there is none.
        """
        path = Path(folder) / RESULTS
        if not path.exists():
            raise FileNotFoundError(f"{folder} holds no comparison: there is no {RESULTS}.")
        stored = read_json(path)
        runs, references = (
            [{key: NAN if value is None else value for key, value in run.items()} for run in stored[part]]
            for part in ("runs", "references")
        )
        return cls(Path(folder), stored["control"], stored["metric"], stored["mode"], runs, references, stored["title"])


def check_metric(run: Mapping[str, Any], metric: str) -> None:
    """Raise a ValueError that names the metrics of ``run`` if ``metric`` is none of them."""
    if metric not in run:
        known = [
            name for name in run if name not in ("method", "seed", "parameters", "steps", "seconds", "cpu_seconds")
        ]
        raise ValueError(
            f"The runs have no metric {metric!r}. The test of {run['method']!r} logged: "
            f"{', '.join(known) or '(nothing)'}. Choose one of them as `metric`; finished runs are not trained again."
        )


def _mean(runs: Sequence[Mapping[str, Any]], key: str) -> float:
    return math.fsum(float(run[key]) for run in runs) / len(runs)
