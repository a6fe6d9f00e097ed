"""The accuracy-against-cost curve of early exits as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_distill.compression.exit_rules import ExitReport


def plot_exit_curve(curve: Sequence[ExitReport], path: str | Path, *, chosen: ExitReport | None = None) -> None:
    """Draw accuracy against operations, relative to the whole network's, into a PNG file.

    Args:
        curve: Points, as :func:`~lightning_distill.compression.exit_curve` gives them; at least one.
        path: Of the picture.
        chosen: A point to mark: the calibrated thresholds, on the same data.

    Raises:
        ValueError: If ``curve`` is empty.
    """
    if len(curve) == 0:
        raise ValueError("`curve` holds no point to draw.")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    points = sorted(curve, key=lambda point: point.relative_cost)
    axes.plot(
        [100 * point.relative_cost for point in points],
        [100 * point.accuracy for point in points],
        marker="o",
        markersize=4,
        label="one threshold for all exits",
    )
    axes.axhline(100 * points[0].full_accuracy, color="0.5", linestyle="--", label="whole network")
    axes.axvline(100, color="0.8", linewidth=1)
    if chosen is not None:
        axes.plot(100 * chosen.relative_cost, 100 * chosen.accuracy, "r*", markersize=14, label="calibrated")
    axes.set_xlabel("operations per sample, % of the whole network's")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"Early exits, {points[0].samples} samples")
    axes.legend(loc="best")
    axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
