"""Networks as ONNX Runtime runs them: how good, how large and how fast, beside each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from torch import nn

from lightning_distill.comparison.files import slug
from lightning_distill.evaluation import evaluate
from lightning_distill.files import write_json
from lightning_distill.hardware import CostModel
from lightning_distill.hardware import cost_model as find_cost_model
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.pipeline.running import has_test_data
from lightning_distill.quantization import OnnxNetwork, export_onnx, onnx_latencies
from lightning_distill.tasks import Classification, Task

RESULT, PLOT = "deployed.json", "deployed.png"
NOTABLE = 0.05


@dataclass(frozen=True)
class DeployedNetwork:
    """A network's file, measured.

    Attributes:
        name: Of the network.
        metrics: The task's metrics of the file on the test data, and ``agreement`` with the network in torch.
        relative_error: Of the file's outputs beside the network's in torch, on the batch that is timed.
        bytes: Of the file.
        seconds: Least time for a batch, one thread: other work on the machine only adds to it.
        relative_time: Share of the first network's.
        predicted_seconds: What the cost model says.
        energy: What the cost model says, joules; not measured.
    """

    name: str
    metrics: dict[str, float]
    relative_error: float
    bytes: int
    seconds: float
    relative_time: float
    predicted_seconds: float
    energy: float


@dataclass(frozen=True)
class DeployedReport:
    """What :func:`measure_deployed` returns; ``rich.print`` shows it as a table.

    Attributes:
        folder: Where the files are.
        metric: The task's metric that the table shows.
        samples: In the batch that was timed.
        cost_model: Name of the model behind the predictions.
        networks: In the order that they were given in.
    """

    folder: Path
    metric: str
    samples: int
    cost_model: str
    networks: tuple[DeployedNetwork, ...]

    def save(self) -> None:
        """Write ``deployed.json`` and ``deployed.png``."""
        content = {key: getattr(self, key) for key in ("metric", "samples", "cost_model")}
        write_json(self.folder / RESULT, {**content, "networks": [vars(network) for network in self.networks]})
        self.plot(self.folder / PLOT)

    def plot(self, path: str | Path) -> None:
        """Draw the metric over size and over time into a PNG file."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2, sharey=True)
        sizes = [network.bytes / 1e3 for network in self.networks]
        times = [network.seconds * 1e3 for network in self.networks]
        values = [network.metrics[self.metric] for network in self.networks]
        for part, places, label in ((axes[0], sizes, "file, kB"), (axes[1], times, f"ms for {self.samples} samples")):
            part.plot(places, values, "-", color="0.8", zorder=1)
            for number, (place, value) in enumerate(zip(places, values, strict=True)):
                part.plot(place, value, "o", color=f"C{number % 10}", label=self.networks[number].name)
            part.set(xscale="log", xlabel=label)
            part.grid(alpha=0.3)
        axes[0].set_ylabel(f"test {self.metric}, ONNX Runtime")
        axes[1].legend(fontsize="small")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)

    def __rich__(self) -> Table:
        """The table."""
        longest = max(len(network.name) for network in self.networks)
        head = (
            f"test\n{self.metric}",
            "as in\ntorch",
            "kB",
            "of\nfirst",
            f"ms for\n{self.samples}",
            "of\nfirst",
            "µJ, by\nmodel",
        )
        table = Table(
            Column("ONNX\nRuntime", overflow="fold", min_width=min(9, longest)),
            *(Column(name, justify="right") for name in head),
            box=SIMPLE_HEAD,
        )
        first = self.networks[0]
        for network in self.networks:
            agreement = network.metrics.get("agreement")
            table.add_row(
                network.name,
                f"{network.metrics[self.metric]:.4f}",
                "–" if agreement is None else f"{agreement:.2%}",
                f"{network.bytes / 1e3:,.1f}",
                f"{network.bytes / first.bytes:.3f}",
                f"{network.seconds * 1e3:.3f}",
                f"{network.relative_time:.2f}",
                f"{network.energy * 1e6:,.1f}",
            )
        return table


def measure_deployed(
    networks: Mapping[str, nn.Module],
    data: L.LightningDataModule,
    folder: str | Path,
    *,
    task: Task | None = None,
    metric: str = "accuracy",
    samples: int = 16,
    repeats: int = 50,
    cost_model: str | Path | CostModel = "ideal",
) -> DeployedReport:
    """Write networks as ONNX files and measure those: on all test data, in bytes, and in time, taken in turns.

    Files of an earlier measurement are replaced, each when the new one is whole. How far its outputs are from the
    network's is reported, with a warning above 5 % of their size.

    Args:
        networks: By name, on the CPU, reading a tensor; quantized ones as
            :func:`~lightning_distill.quantization.export_onnx` writes them. The others are compared with the first.
        data: Its test data are measured on, or those of validation where there are none.
        folder: Gets a file for each network, ``deployed.json`` and ``deployed.png``.
        task: How batches are read. Default :class:`~lightning_distill.tasks.Classification`.
        metric: Of the task, for table and plot.
        samples: Of the batch that is timed, at least 1.
        repeats: How often each file is timed, at least 1.
        cost_model: For predictions of time and energy: a preset, a file or a model; see
            :func:`~lightning_distill.hardware.cost_model`.

    Raises:
        ModuleNotFoundError: If the packages of the extra ``onnx`` are missing.
        RuntimeError: If a file's outputs are not numbers.
        ValueError: If there are no networks, two share a file name, the task has no such metric, or a number is too
            small.
    """
    for name, value in (("samples", samples), ("repeats", repeats)):
        if not value >= 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    folder, task = Path(folder), Classification() if task is None else task
    model = find_cost_model(cost_model)
    paths = {name: folder / f"{slug(name)}.onnx" for name in networks}
    if not paths or len(set(paths.values())) < len(paths):
        raise ValueError(f"`networks` must be one or more with different file names, got {list(networks) or 'none'}.")
    data.prepare_data()
    data.setup("test")
    loader = data.test_dataloader() if has_test_data(data) else data.val_dataloader()
    batch = first_samples(loader, samples)
    inputs = task.inputs(batch)
    measured, errors = {}, {}
    for name, network in networks.items():
        errors[name] = export_onnx(network, inputs, paths[name], tolerance=math.inf, overwrite=True).relative_error
        if errors[name] > NOTABLE:
            warnings.warn(
                f"In ONNX Runtime the outputs of {name!r} differ by {errors[name]:.2g} of their size from torch's.",
                stacklevel=2,
            )
        measured[name] = evaluate(OnnxNetwork(paths[name]), loader, task, reference=network)
        if metric not in measured[name]:
            raise ValueError(f"`metric` must be one of {sorted(measured[name])}, got {metric!r}.")
    times = dict(zip(networks, onnx_latencies(list(paths.values()), inputs, repeats=repeats), strict=True))
    first = times[next(iter(networks))]
    rows = []
    for name, network in networks.items():
        predicted = model.estimate(network, batch, run=task.run)
        rows.append(
            DeployedNetwork(
                name=name,
                metrics=measured[name],
                relative_error=errors[name],
                bytes=paths[name].stat().st_size,
                seconds=min(times[name]),
                relative_time=min(times[name]) / min(first),
                predicted_seconds=predicted.latency,
                energy=predicted.energy,
            )
        )
    report = DeployedReport(folder, metric, task.batch_size(batch), model.name, tuple(rows))
    report.save()
    return report


__all__ = ["DeployedNetwork", "DeployedReport", "measure_deployed"]
