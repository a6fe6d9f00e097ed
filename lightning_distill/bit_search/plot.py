"""A bit search as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_distill.quantization.spec import mean_bits

if TYPE_CHECKING:
    from lightning_distill.bit_search.result import BitSearchResult

BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#999999", "#D55E00"
SHOWN = 40


def plot_search(result: BitSearchResult, path: str | Path) -> None:
    """Draw divergence against bits per weight of all plans that were tried, and the bits of each layer, into a PNG."""
    from matplotlib.figure import Figure

    layers = list(result.plan)[:SHOWN]
    unit = "bits per weight" if result.unit == "bits" else f"{result.unit} for a batch"
    figure = Figure(figsize=(10, max(4.0, 1.4 + 0.25 * len(layers))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    smallest = min((trial.loss for trial in result.trials if trial.loss > 0), default=1e-6)

    def place(trials: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
        return [result.in_all(cost) for cost, _ in trials], [max(loss, smallest) for _, loss in trials]

    left.scatter(*place([(t.cost, t.loss) for t in result.trials]), s=14, color=GREY, linewidths=0, label="tried")
    uniform = [(t.cost, t.loss) for t in result.trials if len(set(t.plan.values())) == 1]
    if uniform:
        left.scatter(
            *place(uniform), s=36, marker="s", color=ORANGE, linewidths=0, label="the same bits everywhere", zorder=3
        )
    left.step(*place([(t.cost, t.loss) for t in result.front()]), where="post", color=BLUE, label="front", zorder=2)
    left.plot([result.cost], [max(result.loss, smallest)], "*", color=RED, markersize=15, label="plan", zorder=4)
    left.axvline(result.budget, color=GREY, linestyle="--", linewidth=1, label="budget")
    left.set(
        yscale="log",
        xlabel=unit,
        ylabel="divergence from full precision",
    )
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    bars = right.barh(range(len(layers)), [mean_bits(result.plan[layer]) for layer in layers], color=BLUE)
    right.bar_label(bars, fmt="%.3g", padding=2, fontsize="small")
    names = layers if len(layers) == len(result.plan) else [*layers[:-1], f"{layers[-1]} …"]
    right.set_yticks(
        range(len(layers)), [name if len(name) <= 28 else "…" + name[-27:] for name in names], fontsize="small"
    )
    right.invert_yaxis()
    right.set(xlabel="bits of a weight", title=f"{result.effective_bits:.2f} bits per weight, {result.bytes:,} bytes")
    right.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


__all__ = ["plot_search"]
