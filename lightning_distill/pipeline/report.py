"""What the stages of a pipeline reached, kept and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from lightning_distill.comparison.files import slug
from lightning_distill.files import write_json
from lightning_distill.pipeline.deployed import DeployedReport
from lightning_distill.pipeline.manifest import finished_manifest
from lightning_distill.pipeline.stage import Stage

REPORT = "report.json"
PLOT = "report.png"


@dataclass(frozen=True)
class StageReport:
    """A finished stage in numbers.

    Attributes:
        name: Of the stage.
        monitor: Name of the metric by which its best checkpoint was chosen.
        metric: Of its best checkpoint, on the validation data; ``None`` without validation.
        test: The same metric on the test data, where there are some.
        retention: ``metric`` over that of the first stage; ``None`` where less is better, or nothing was measured.
        parameters: Of the exported network.
        bytes: Of weights and buffers, quantized ones packed.
        flops: Floating-point operations of one sample (twice the multiply-adds); ``None`` if they cannot be counted.
        seconds: Of the training, all attempts together.
        steps: Of the optimizer.
        metrics: All validation and test metrics.
    """

    name: str
    monitor: str
    metric: float | None
    test: float | None
    retention: float | None
    parameters: int
    bytes: int
    flops: float | None
    seconds: float
    steps: int
    metrics: dict[str, float]

    def line(self) -> str:
        """In one line."""
        reached = "no validation" if self.metric is None else f"{self.monitor} {self.metric:.4f}"
        return f"{self.name}: {reached}, {self.steps} steps, {self.seconds:.0f} s"


@dataclass(frozen=True)
class PipelineReport:
    """What :meth:`Pipeline.run` returns; ``rich.print`` shows it as a table.

    Attributes:
        folder: Of the pipeline.
        monitor: Name of the metric of the first stage.
        stages: In order.
        deployed: The networks as ONNX Runtime runs them, if that was asked for.
    """

    folder: Path
    monitor: str
    stages: list[StageReport]
    deployed: DeployedReport | None = None

    def save(self) -> None:
        """Write ``report.json``."""
        content = {"monitor": self.monitor, "stages": [vars(stage) for stage in self.stages]}
        write_json(self.folder / REPORT, content)

    def plot(self) -> Path:
        """Write ``report.png``: the metric of each stage over the size of its weights.

        Returns:
            Its path.
        """
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        points = [(stage.name, stage.bytes / 1e3, stage.metric) for stage in self.stages if stage.metric is not None]
        axes.plot([size for _, size, _ in points], [metric for _, _, metric in points], "o-")
        for name, size, metric in points:
            axes.annotate(name, (size, metric), textcoords="offset points", xytext=(6, 6))
        axes.set(xscale="log", xlabel="weights, kB", ylabel=self.monitor, title="Stages, from the first to the last")
        axes.margins(x=0.25, y=0.15)  # room for the names
        axes.grid(alpha=0.3)
        path = self.folder / PLOT
        figure.savefig(path, dpi=120)
        return path

    def __rich__(self) -> Table:
        """The table."""
        measured = [name.replace("/", "/\n", 1) for name in (self.monitor, _on_test(self.monitor))]
        table = Table(
            Column("stage", overflow="fold", min_width=min(9, max(len(stage.name) for stage in self.stages))),
            *(Column(name, justify="right") for name in (measured[0], "kept", measured[1])),
            *(Column(name, justify="right") for name in ("weights", "kB", "MFLOP /\nsample", "time")),
            box=SIMPLE_HEAD,
        )
        for stage in self.stages:
            table.add_row(
                stage.name,
                _or_dash(stage.metric, "{:.4f}"),
                _or_dash(stage.retention, "{:.1%}"),
                _or_dash(stage.test, "{:.4f}"),
                f"{stage.parameters:,}",
                f"{stage.bytes / 1e3:,.1f}",
                _or_dash(None if stage.flops is None else stage.flops / 1e6, "{:.3g}"),
                f"{stage.seconds:.0f} s",
            )
        return table


def pipeline_report(folder: Path, stages: Sequence[Stage]) -> PipelineReport:
    """Read what finished ``stages`` have written into ``folder``."""
    records = [finished_manifest(folder / slug(stage.name)) or {} for stage in stages]
    reference = records[0]["metric"]
    rows = []
    for stage, record in zip(stages, records, strict=True):
        metric = record["metric"]
        comparable = stage.mode == "max" and metric is not None and bool(reference)
        rows.append(
            StageReport(
                name=stage.name,
                monitor=stage.monitor,
                metric=metric,
                test=record["metrics"].get(_on_test(stage.monitor)),
                retention=metric / reference if comparable else None,
                **{key: record[key] for key in ("parameters", "bytes", "flops", "seconds", "steps", "metrics")},
            )
        )
    return PipelineReport(folder, stages[0].monitor, rows)


def _on_test(monitor: str) -> str:
    """Name of a validation metric on the test data."""
    return f"test/{monitor.removeprefix('val/')}"


def _or_dash(value: float | None, text: str) -> str:
    return "–" if value is None else text.format(value)
