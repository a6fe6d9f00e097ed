"""Only the directions in which the teacher's features vary most."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.distances.inputs import same_shape, upcast, without_autocast
from lightning_distill.losses.lazy import Shape
from lightning_distill.losses.ranks import sum_over_ranks
from lightning_distill.losses.refreshed import Refreshed


@torch.no_grad()
@without_autocast
def top_right_singular_vectors(features: Tensor, rank: int) -> Tensor:
    """The ``rank`` right singular vectors of a matrix that belong to its largest singular values.

    From the second moment of the columns, so that the number of rows costs no memory.

    Args:
        features: Shape ``(N, d)``.
        rank: From 1 to ``d``.

    Returns:
        Orthonormal columns, shape ``(d, rank)``, in float32 or wider, without a graph.

    Raises:
        ValueError: If ``rank`` is out of range.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return _leading_eigenvectors(wide.T @ wide, rank)


@without_autocast
def low_rank_distance(student: Tensor, teacher: Tensor, basis: Tensor) -> Tensor:
    """Squared difference of the projections on ``basis``, mean over its columns.

    The factors of a low-rank approximation are unique up to an invertible matrix only, so that comparing those of two
    networks has no meaning; projections on the same basis do. It does not matter which basis of the same space it is.
    With ``rank = d`` this is the plain mean squared difference.

    Args:
        student: Shape ``(..., d)``; the only input that gets a gradient.
        teacher: Same shape; detached here.
        basis: Orthonormal columns, shape ``(d, rank)``.

    Returns:
        Shape ``(...)``, in float32 or wider.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return ((student - teacher) @ basis.to(student.dtype)).square().mean(dim=-1)


class LowRank(Refreshed):
    """:func:`low_rank_distance` on the teacher's leading directions, found anew every ``every`` forward passes.

    The directions come from the batches of all processes together and are kept in the checkpoint.

    Args:
        rank: Number of directions, positive.
        every: Forward passes in training between two bases, positive. The decomposition costs ``d ** 3``.

    Raises:
        ValueError: If an argument is not positive; when built, if the rank exceeds the width.
    """

    basis: Tensor

    def __init__(self, rank: int, every: int = 100) -> None:
        super().__init__(every)
        if not rank >= 1:
            raise ValueError(f"`rank` must be positive, got {rank}.")
        self.rank = rank

    def make(self, *shapes: Shape) -> None:
        """A basis for the teacher's width."""
        width = shapes[1][-1]
        if self.rank > width:
            raise ValueError(f"`rank` must be at most the teacher's width {width}, got {self.rank}.")
        self.register_buffer("basis", torch.eye(width, self.rank))

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per position, ``(B, *P)``."""
        if self.training and torch.is_grad_enabled() and self.is_due():
            self._fit(teacher[mask] if mask is not None else teacher.flatten(0, -2))
        return low_rank_distance(student, teacher, self.basis)

    @torch.no_grad()
    def _fit(self, rows: Tensor) -> None:
        rows = upcast(rows, rows)[1]
        with torch.autocast(rows.device.type, enabled=False):
            moment = sum_over_ranks(rows.T @ rows)
        if bool(moment.any()):
            self.basis.copy_(_leading_eigenvectors(moment, self.rank))


def _leading_eigenvectors(moment: Tensor, rank: int) -> Tensor:
    if not 1 <= rank <= len(moment):
        raise ValueError(f"`rank` must be from 1 to the width {len(moment)}, got {rank}.")
    vectors: Tensor = torch.linalg.eigh(moment).eigenvectors
    return vectors[:, -rank:].flip(-1)
