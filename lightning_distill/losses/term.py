"""The interface of a loss term, and the one place where its values become a scalar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lightning_distill.outputs import Outputs, Step


class Term(nn.Module):
    """One named part of a distillation loss.

    A term implements ``forward(step)`` and returns one value per item (sample or token), of the item shape;
    or a scalar, if it compares whole batches. It neither masks nor averages nor weights: :func:`reduce_items` does
    that for all terms alike. Parameters (projections) are trained with the student and left behind at export.

    Attributes:
        needs_teacher: Whether ``step.teacher`` must be there.
        student_taps: Names of the student's activations that the term reads from ``step.student.features``.
        teacher_taps: The same for the teacher.
        parts: For terms that compute several losses at once: the parts by name after a forward, detached scalars, for
            the log.
    """

    needs_teacher: bool = True
    student_taps: Iterable[str] = ()
    teacher_taps: Iterable[str] = ()
    parts: Mapping[str, Tensor] = MappingProxyType({})

    def build(self, step: Step) -> None:
        """Create the parameters whose shapes only a batch tells (see :class:`~lightning_distill.losses.lazy.Lazy`)."""

    def forward(self, step: Step) -> Tensor:
        """Value of each item, shape of the items; or a scalar for the whole batch."""
        raise TypeError(f"{type(self).__name__} is a `Term` without a `forward(step)`; define one.")


def teacher_outputs(step: Step) -> Outputs:
    """The teacher's side of ``step``, for terms that need it.

    Raises:
        ValueError: If the step has no teacher.
    """
    if step.teacher is None:
        raise ValueError(
            "This loss term compares the student with a teacher, but there is none. Pass `teacher=...` to the "
            "module, or leave the term out (for `KD`, `alpha=1.0` trains on labels alone)."
        )
    return step.teacher


def reduce_items(values: Tensor, mask: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Mean of ``values`` over the items that count.

    Every item adds ``weight * value`` to the sum and one to the count, also where its value or weight is zero
    (an item without a label in a term on labels, say). The mean over a large batch is therefore the mean of the
    means over its parts, however it was split: the gradient depends neither on micro-batches nor on ranks.

    Args:
        values: Shape of the items, or a scalar, which is returned as it is.
        mask: Which items count, boolean, same shape; ``None`` for all.
        weights: Weight of each item, broadcastable to the items; 1 by default.

    Returns:
        Scalar; 0, with a graph, if no item counts.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if values.ndim == 0:
        return values
    if weights is not None:
        values = values * weights
    if mask is None:
        return values.mean() if values.numel() > 0 else values.sum()  # the sum of nothing is 0, with a graph
    if mask.shape != values.shape:
        raise ValueError(
            f"A loss term returned values of shape {tuple(values.shape)} for items of shape {tuple(mask.shape)}; "
            "it must return one value per item, or a scalar."
        )
    return torch.where(mask, values, 0).sum() / mask.sum().clamp_min(1)
