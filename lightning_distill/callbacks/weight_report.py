"""A table and a plot of the weights over the training."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from lightning_distill.callbacks.weighting import distillation_module


class WeightReport(L.Callback):
    """Write the weights of the terms over the training: ``weights.csv`` and ``weights.png``, next to the logs.

    For every weighting: fixed, scheduled, learned or balanced. A row per ``every_n_steps`` optimizer steps and one for
    the last; a weight that a term did not have yet is empty. Rows of a run that is resumed continue those before.

    Args:
        every_n_steps: How often; by default ``log_every_n_steps`` of the Trainer.
        folder: Where to write; by default the logger's folder, or without one the Trainer's ``default_root_dir``.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(self, every_n_steps: int | None = None, folder: str | None = None) -> None:
        if every_n_steps is not None and not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.folder = folder
        self.rows: list[dict[str, float]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that the module has weights."""
        distillation_module(self, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the weights, if it is time."""
        every = self.every_n_steps or max(getattr(trainer, "log_every_n_steps", 50), 1)
        if trainer.global_step % every == 0:
            self._note(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write table and plot."""
        self._note(trainer, pl_module)
        if trainer.is_global_zero:
            folder = Path(self.folder or trainer.log_dir or trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            write_table(self.rows, folder / "weights.csv")
            plot_weights(self.rows, folder / "weights.png")

    def _note(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.rows and self.rows[-1]["step"] == trainer.global_step:
            return
        weights = distillation_module(self, pl_module).weighting.weights()
        self.rows.append({"step": trainer.global_step} | {name: float(value) for name, value in weights.items()})

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": [dict(row) for row in self.rows]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the rows of the run before."""
        self.rows = [dict(row) for row in state_dict["rows"]]


def write_table(rows: list[dict[str, float]], path: Path) -> None:
    """Write ``rows``, each with its ``step`` and the terms' weights, as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=_columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def plot_weights(rows: list[Mapping[str, float]] | list[dict[str, float]], path: Path) -> None:
    """Draw the weights of the terms over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in _columns(rows)[1:]:
        points = [(row["step"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else None)
    axes.set(xlabel="optimizer step", ylabel="weight", title="Weights of the loss terms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=120)


def _columns(rows: list[Mapping[str, float]] | list[dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(["step", *(name for row in rows for name in row)]))
