"""Alignments in closed form: how one space of features is turned into another."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.losses.distances.inputs import without_autocast
from lightning_distill.losses.lazy import Shape
from lightning_distill.losses.ranks import sum_over_ranks
from lightning_distill.losses.refreshed import Refreshed


@dataclass(frozen=True)
class Alignment:
    """``scale * (features - student_mean) @ rotation + teacher_mean``.

    Attributes:
        rotation: Shape ``(d_S, d_T)``; its columns or its rows, whichever are fewer, are orthonormal.
        scale: Scalar.
        student_mean: Shape ``(d_S,)``.
        teacher_mean: Shape ``(d_T,)``.
    """

    rotation: Tensor
    scale: Tensor
    student_mean: Tensor
    teacher_mean: Tensor

    @without_autocast
    def __call__(self, features: Tensor) -> Tensor:
        """``(..., d_S)`` to ``(..., d_T)``, in float32 or wider."""
        wide = torch.promote_types(torch.promote_types(features.dtype, self.rotation.dtype), torch.float32)
        rotation, scale, student_mean, teacher_mean = (
            part.to(wide) for part in (self.rotation, self.scale, self.student_mean, self.teacher_mean)
        )
        return scale * ((features.to(wide) - student_mean) @ rotation) + teacher_mean


@torch.no_grad()
def procrustes(student: Tensor, teacher: Tensor, *, scale: bool = False, center: bool = True) -> Alignment:
    r"""The rotation (and reflection) that brings the student's features closest to the teacher's.

    .. math:: \min_{R^T R = I} \| S R - T \|_F: \qquad R = U V^T, \quad S^T T = U \Sigma V^T

    Schönemann (1966). The singular values belong to the optimal scale, ``sum(Sigma) / |S|^2``, not to the rotation. For
    ``d_S <= d_T`` the solution is exact; for a wider student ``R`` maximizes the correlation ``tr(R^T S^T T)``.

    Args:
        student: Shape ``(N, d_S)``.
        teacher: Shape ``(N, d_T)``.
        scale: Whether to scale as well.
        center: Whether to move both means to zero first.

    Returns:
        Without a graph, in float32 or wider. Of features that are all zero, some rotation and a scale of 1.

    Raises:
        ValueError: If the numbers of rows differ.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"Procrustes alignment needs (N, d) of the same N rows, got shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    found = _align(_moments(student, teacher), student.shape[1], scale=scale, center=center)
    return Alignment(*(part.to(wide) for part in (found.rotation, found.scale, found.student_mean, found.teacher_mean)))


class Procrustes(Refreshed):
    """A transform of the student's features by :func:`procrustes`, found anew every ``every`` steps.

    It has no trained parameters: the student alone moves. The alignment comes from the batches of all processes
    together and is kept in the checkpoint. Give batches with more positions than the features are wide.

    Args:
        every: Forward passes in training between two alignments, positive. One costs ``d ** 3``.
        scale: See :func:`procrustes`.
        center: See :func:`procrustes`.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    rotation: Tensor
    factor: Tensor
    student_mean: Tensor
    teacher_mean: Tensor

    def __init__(self, every: int = 100, scale: bool = False, center: bool = True) -> None:
        super().__init__(every)
        self.scale = scale
        self.center = center

    def make(self, *shapes: Shape) -> None:
        """Buffers for the two widths; until the first fit, the student's first features as they are."""
        student, teacher = (shape[-1] for shape in shapes)
        self.register_buffer("rotation", torch.eye(student, teacher))
        self.register_buffer("factor", torch.ones(()))
        self.register_buffer("student_mean", torch.zeros(student))
        self.register_buffer("teacher_mean", torch.zeros(teacher))

    @torch.no_grad()
    def fit(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> None:
        """Align the features ``(B, *P, d)`` of both sides at the positions that count, if it is time to."""
        if self.is_due():
            rows = [side[mask] if mask is not None else side.flatten(0, -2) for side in (student, teacher)]
            moments = sum_over_ranks(_moments(*rows))
            if bool(moments.isfinite().all()):  # what is not finite is reported by the loss
                found = _align(moments, student.shape[-1], scale=self.scale, center=self.center)
                self.rotation.copy_(found.rotation)
                self.factor.copy_(found.scale)
                self.student_mean.copy_(found.student_mean)
                self.teacher_mean.copy_(found.teacher_mean)

    def forward(self, features: Tensor) -> Tensor:
        """``(..., d_S)`` to ``(..., d_T)``."""
        return Alignment(self.rotation, self.factor, self.student_mean, self.teacher_mean)(features)


@torch.no_grad()
def metric_matching_transform(
    student_metric: Tensor, teacher_metric: Tensor, *, rotation: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    r"""A map ``T`` with :math:`T^T G_T T = G_S`: it carries the teacher's metric over to the student's features.

    :math:`T = G_T^{-1/2} Q \, G_S^{1/2}` solves this exactly for every orthogonal ``Q``, so that metrics alone do not
    tell which map is meant; :func:`procrustes` does. The metrics are second moments of features, ``F^T F / N``, of one
    width.

    Args:
        student_metric: Symmetric, not negative, shape ``(d, d)``.
        teacher_metric: The same.
        rotation: ``Q``; the unit matrix by default.
        eps: Added to the eigenvalues of the teacher's metric, relative to the largest, so that it can be inverted.

    Returns:
        Shape ``(d, d)``, without a graph, in float32 or wider.

    Raises:
        ValueError: If the shapes are not square and equal.
    """
    if student_metric.ndim != 2 or student_metric.shape[0] != student_metric.shape[1]:
        raise ValueError(f"A metric has the shape (d, d), got {tuple(student_metric.shape)}.")
    if student_metric.shape != teacher_metric.shape:
        raise ValueError(
            f"The metrics must be of one width, got {tuple(student_metric.shape)} and {tuple(teacher_metric.shape)}; "
            "for different widths use `procrustes`."
        )
    wide = torch.promote_types(torch.promote_types(student_metric.dtype, teacher_metric.dtype), torch.float32)
    root = _power(student_metric.to(wide), 0.5, 0.0)
    inverse_root = _power(teacher_metric.to(wide), -0.5, eps)
    return inverse_root @ (root if rotation is None else rotation.to(wide) @ root)


def _moments(student: Tensor, teacher: Tensor) -> Tensor:
    """What an alignment needs, as one sum over rows: ``[1, S, |S|^2]^T [1, T]``, shape ``(d_S + 2, d_T + 1)``."""
    wide = torch.float32 if student.device.type == "mps" else torch.float64  # sums of squares lose digits
    student, teacher = student.to(wide), teacher.to(wide)
    one = torch.ones_like(student[:, :1])
    left = torch.cat([one, student, student.square().sum(dim=1, keepdim=True)], dim=1)
    with torch.autocast(student.device.type, enabled=False):
        return left.T @ torch.cat([one, teacher], dim=1)


def _align(moments: Tensor, width: int, *, scale: bool, center: bool) -> Alignment:
    number = moments[0, 0].clamp_min(1)
    student_sum, teacher_sum = moments[1 : width + 1, 0], moments[0, 1:]
    cross, square = moments[1 : width + 1, 1:], moments[-1, 0]
    student_mean, teacher_mean = torch.zeros_like(student_sum), torch.zeros_like(teacher_sum)
    if center:
        student_mean, teacher_mean = student_sum / number, teacher_sum / number
        cross = cross - number * torch.outer(student_mean, teacher_mean)
        square = square - number * student_mean.square().sum()
    u, sigma, vh = torch.linalg.svd(cross, full_matrices=False)
    one = torch.ones_like(square)
    rounding = 1e-12 * moments[-1, 0]
    factor = torch.where(square > rounding, sigma.sum() / square.where(square > rounding, 1), one) if scale else one
    return Alignment(u @ vh, factor, student_mean, teacher_mean)


def _power(metric: Tensor, exponent: float, eps: float) -> Tensor:
    values, vectors = torch.linalg.eigh((metric + metric.T) / 2)
    values = values.clamp_min(0)
    values = values + eps * values.max()
    smallest = torch.finfo(values.dtype).tiny
    power: Tensor = (vectors * values.clamp_min(smallest) ** exponent) @ vectors.T
    return power
