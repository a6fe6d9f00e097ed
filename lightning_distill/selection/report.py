"""What a selection took."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.outputs import UNLABELLED


@dataclass(frozen=True)
class SelectionReport:
    """What was selected of how many items, and how evenly over the classes.

    Attributes:
        n: Number of items that count.
        fraction: Share of them that was selected; NaN without items.
        class_fractions: The same for the items of each class; NaN for a class without items.
        balance: Entropy of the selected items' classes over the highest possible, ``log K``: 1 if every class has as
            many, 0 if all are of one class; NaN if nothing was selected or there are fewer than two classes.
        metric_per_flop: Metric over the operations that the teacher needs for the selected items, where both were
            given. It says what a teacher that looks only at those costs; a module that lets it look at all of them
            saves nothing.
    """

    n: int
    fraction: float
    class_fractions: tuple[float, ...]
    balance: float
    metric_per_flop: float | None = None

    @property
    def balanced(self) -> bool:
        """Whether the balance is at least 0.95."""
        return self.balance >= 0.95


def selection_report(
    selected: Tensor,
    labels: Tensor | None = None,
    classes: int = 0,
    *,
    mask: Tensor | None = None,
    metric: float | None = None,
    teacher_flops: float | None = None,
) -> SelectionReport:
    """Fraction and balance of a selection.

    Args:
        selected: Which items were selected, boolean, any shape.
        labels: Class of each item, same shape; ``-100`` for none.
        classes: Number of classes ``K``.
        mask: Which items count, boolean, same shape.
        metric: What was reached with the selection, an accuracy for instance.
        teacher_flops: Operations of the teacher for one item, positive.

    Raises:
        ValueError: If the shapes differ, or ``teacher_flops`` is not positive.

    Example:
        >>> report = selection_report(torch.tensor([True, False, True]), torch.tensor([0, 0, 1]), 2)
        >>> round(report.fraction, 3), report.class_fractions, report.balance
        (0.667, (0.5, 1.0), 1.0)
    """
    return report_of_counts(
        selection_counts(selected, labels, classes, mask=mask), metric=metric, teacher_flops=teacher_flops
    )


def selection_counts(
    selected: Tensor, labels: Tensor | None = None, classes: int = 0, *, mask: Tensor | None = None
) -> Tensor:
    """Counts that add up over batches: selected items (first row) and all items (second), of each class and in all.

    Returns:
        Shape ``(2, K + 1)``, float64; the last column counts all items, with a class and without.
    """
    for name, other in {"labels": labels, "mask": mask}.items():
        if other is not None and other.shape != selected.shape:
            raise ValueError(
                f"`selected` and `{name}` must have the same shape, got {tuple(selected.shape)} and "
                f"{tuple(other.shape)}."
            )
    counted = torch.ones_like(selected) if mask is None else mask
    rows = []
    for items in (selected & counted, counted):
        if labels is None:
            of_class = torch.zeros(classes, device=selected.device)
        else:
            of_class = torch.bincount(labels[items & (labels != UNLABELLED)], minlength=classes)[:classes]
        rows.append(torch.cat([of_class.double(), items.sum().double()[None]]))
    return torch.stack(rows)


def report_of_counts(
    counts: Tensor, *, metric: float | None = None, teacher_flops: float | None = None
) -> SelectionReport:
    """The report of what :func:`selection_counts` counted, or of a sum of its results."""
    if teacher_flops is not None and not 0 < teacher_flops < math.inf:
        raise ValueError(f"`teacher_flops` must be positive, got {teacher_flops}.")
    selected, every = counts.double().cpu()
    fractions = (selected / every).tolist()  # 0 / 0 is NaN
    shares, classes = selected[:-1], len(selected) - 1
    balance = math.nan
    if classes >= 2 and shares.sum() > 0:
        balance = torch.special.entr(shares / shares.sum()).sum().item() / math.log(classes)
    per_flop = None
    if metric is not None and teacher_flops is not None:
        work = teacher_flops * selected[-1].item()
        per_flop = metric / work if work > 0 else math.nan
    return SelectionReport(int(every[-1]), fractions[-1], tuple(fractions[:-1]), balance, per_flop)
