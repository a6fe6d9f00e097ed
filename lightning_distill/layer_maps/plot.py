"""A layer map as a picture."""

from __future__ import annotations

from pathlib import Path

import torch

from lightning_distill.layer_maps.layer_map import EMBEDDINGS, LayerMap


def plot_map(layers: LayerMap, path: Path) -> Path:
    """Draw ``layers`` to ``path``; see :meth:`~lightning_distill.layer_maps.LayerMap.plot`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    importance = layers.scores is not None and layers.scores.ndim == 1
    size = (2.0 + 0.42 * layers.teacher_depth, 1.9 + 0.42 * layers.student_depth + (1.3 if importance else 0.0))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    if importance:
        assert layers.scores is not None
        grid = figure.add_gridspec(2, 1, height_ratios=(1.3, 0.42 * layers.student_depth + 0.6))
        bars, axes = figure.add_subplot(grid[0]), figure.add_subplot(grid[1])
        chosen = set(layers.teacher)
        numbers = range(1, layers.teacher_depth + 1)
        colors = ["tab:blue" if number in chosen else "lightgray" for number in numbers]
        bars.bar(numbers, layers.scores.tolist(), color=colors)
        bars.set(xlim=(0.5, layers.teacher_depth + 0.5), xticks=[], ylabel=layers.score)
        bars.spines[["top", "right"]].set_visible(False)
    else:
        axes = figure.add_subplot()
    cells = torch.zeros(layers.student_depth, layers.teacher_depth)
    if layers.scores is not None and not importance:
        cells = layers.scores
        picture = axes.imshow(cells.numpy(), cmap="Blues", aspect="equal")
        picture.axes.figure.colorbar(picture, ax=axes, label=layers.score, shrink=0.8)
    else:
        for ours, theirs in layers:
            if ours != EMBEDDINGS:
                cells[ours - 1, theirs - 1] = 1
        axes.imshow(cells.numpy(), cmap="Blues", aspect="auto" if importance else "equal", vmin=0, vmax=1.6)
    for ours, theirs in layers:
        if ours != EMBEDDINGS:
            axes.add_patch(
                Rectangle((theirs - 1.5, ours - 1.5), 1, 1, fill=False, edgecolor="tab:red", linewidth=2, clip_on=False)
            )
    axes.set_xticks(range(layers.teacher_depth), [str(number + 1) for number in range(layers.teacher_depth)])
    axes.set_yticks(range(layers.student_depth), [str(number + 1) for number in range(layers.student_depth)])
    axes.set(xlabel="teacher layer", ylabel="student layer")
    (bars if importance else axes).set_title(layers.method, fontsize="medium")
    figure.savefig(path, dpi=120)
    return path
