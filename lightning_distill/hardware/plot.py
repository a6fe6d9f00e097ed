"""What the layers of a network cost, as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_distill.hardware.cost_model import CostReport

BLUE, ORANGE = "#0072B2", "#E69F00"
SHOWN = 40


def plot_costs(report: CostReport, path: str | Path) -> None:
    """Draw each layer's share of latency and of energy into a PNG; the 40 slowest layers if there are more."""
    from matplotlib.figure import Figure

    slowest = sorted(report.layers, key=lambda layer: -layer.latency)[:SHOWN]
    layers = [layer for layer in report.layers if any(layer is one for one in slowest)]
    figure = Figure(figsize=(10, max(3.0, 1.2 + 0.25 * len(layers))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.barh(range(len(layers)), [layer.latency * 1e6 for layer in layers], color=BLUE)
    right.barh(range(len(layers)), [layer.energy * 1e6 for layer in layers], color=ORANGE)
    names = [f"{layer.cost.name} ({layer.cost.kind})" for layer in layers]
    left.set_yticks(
        range(len(layers)), [name if len(name) <= 40 else "…" + name[-39:] for name in names], fontsize="small"
    )
    left.invert_yaxis()
    left.set(xlabel="microseconds", title=f"latency {report.latency * 1e3:,.3g} ms")
    right.set(xlabel="microjoules", title=f"energy {report.energy * 1e3:,.3g} mJ")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", alpha=0.3)
    left_out = len(report.layers) - len(layers)
    rest = f"; {left_out} faster layers are not shown" if left_out else ""
    figure.suptitle(f"estimates for one batch, cost model {report.model!r}{rest}", fontsize="medium")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
