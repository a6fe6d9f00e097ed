"""Relations between the samples of a batch, which networks of any two widths can share.

All of these compare samples with each other: the value of a batch is not the mean over its parts and depends on the
batch size, so the gradient is exact for each micro-batch, not for each optimizer step. Sequences and maps are pooled to
one vector per sample first (:func:`~lightning_distill.losses.distances.inputs.samples`) unless said. They return a
scalar, and 0 where too few samples are left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_distill.losses.distances.inputs import samples, unit, upcast, without_autocast, zero_where_masked

CHUNK_ELEMENTS = 2**24
"""Numbers of a chunk of :func:`angle_relation`; 64 MiB in float32."""


@without_autocast
def similarity_preserving(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of the two networks' similarities between samples: SP of Tung and Mori (2019).

    .. math:: \frac{1}{B^2} \|\tilde G_S - \tilde G_T\|_F^2, \qquad G = Q Q^T, \; \tilde G_i = G_i / \|G_i\|

    with ``Q`` the features of each sample, all positions side by side (section 3, https://arxiv.org/abs/1907.09682).
    Nothing larger than ``B x B`` is made.

    Args:
        student: Shape ``(B, *P_S, d_S)``; the only input that gets a gradient.
        teacher: Shape ``(B, *P_T, d_T)``; detached here. Positions and widths may differ.
        mask: Which positions count, boolean; used for a side with such positions.

    Returns:
        Scalar, in float32 or wider.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> similarity_preserving(features, 3 * features)
        tensor(0.)
    """
    similarities = []
    for side in upcast(student, teacher):
        if mask is not None and mask.shape == side.shape[:-1]:
            side = zero_where_masked(side, mask)
        rows = side.flatten(1)
        similarities.append(unit(rows @ rows.T))
    return (similarities[0] - similarities[1]).square().mean() if len(student) else student.sum()


def feature_correlation(features: Tensor, *, over: Literal["samples", "features"] = "features") -> Tensor:
    """Pearson correlation between features over the samples, or between samples over the features.

    Args:
        features: Shape ``(N, d)``.
        over: What is correlated with each other: ``"features"`` gives a matrix ``(d, d)``, ``"samples"`` ``(N, N)``.

    Returns:
        In float32 or wider. Rows and columns of something constant are 0 and get no gradient.

    Raises:
        ValueError: If ``over`` is unknown or ``features`` is no matrix.

    Example:
        >>> feature_correlation(torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])).round(decimals=3)
        tensor([[1., 1.],
                [1., 1.]])
    """
    if over not in ("samples", "features"):
        raise ValueError(f"`over` must be 'samples' or 'features', got {over!r}.")
    if features.ndim != 2:
        raise ValueError(f"`features` must have the shape (samples, features), got {tuple(features.shape)}.")
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    rows = features.T if over == "features" else features
    rows = _centred_unit(rows)
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.T


@dataclass(frozen=True)
class Correlation:
    r"""Mean squared difference of the two networks' correlations, :math:`\|C_S - C_T\|_F^2` over the matrix' entries.

    Args:
        over: ``"samples"`` compares ``B x B`` correlations between samples, pooled over their positions, and takes any
            two widths (correlation congruence, Peng et al. 2019, https://arxiv.org/abs/1904.01802, with Pearson's
            correlation as the kernel). ``"features"`` compares ``d x d`` correlations between features over all
            positions that count, and needs equal widths.

    Raises:
        ValueError: If ``over`` is unknown; when called, if the widths differ for ``"features"``.
    """

    over: Literal["samples", "features"] = "samples"

    def __post_init__(self) -> None:
        if self.over not in ("samples", "features"):
            raise ValueError(f"`over` must be 'samples' or 'features', got {self.over!r}.")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar."""
        if self.over == "samples":
            student, teacher = samples(student, teacher, mask)
        else:
            if student.shape[-1] != teacher.shape[-1]:
                raise ValueError(
                    f"Correlations between features can be compared for equal widths only, got {student.shape[-1]} for "
                    f"the student and {teacher.shape[-1]} for the teacher. Use `transform='linear'`, or "
                    "`Correlation(over='samples')`."
                )
            student, teacher = (
                side[mask] if mask is not None and mask.shape == side.shape[:-1] else side.flatten(0, -2)
                for side in upcast(student, teacher)
            )
        if len(student) == 0:
            return student.sum()
        difference = feature_correlation(student, over=self.over) - feature_correlation(teacher, over=self.over)
        return difference.square().mean()


@without_autocast
def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between distances of samples, each network's divided by its mean: RKD-D of Park et al. (2019).

    Section 3.2.1 of https://arxiv.org/abs/1904.05068, with the mean over all ``B x B`` pairs as in the authors' code.

    Args:
        student: Shape ``(B, d_S)``; the only input that gets a gradient.
        teacher: Shape ``(B, d_T)``; detached here.

    Returns:
        Scalar, in float32 or wider.
    """
    student, teacher = upcast(student, teacher)
    if len(student) < 2:
        return student.sum() * 0
    return F.smooth_l1_loss(_scaled_distances(student), _scaled_distances(teacher))


@without_autocast
def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss between the angles of all triplets of samples: RKD-A of Park et al. (2019), section 3.2.2.

    ``B ** 3`` cosines are compared, in chunks that are computed again in the backward pass once they exceed
    :data:`CHUNK_ELEMENTS` numbers.

    Args:
        student: Shape ``(B, d_S)``; the only input that gets a gradient.
        teacher: Shape ``(B, d_T)``; detached here.

    Returns:
        Scalar, in float32 or wider.
    """
    student, teacher = upcast(student, teacher)
    number = len(student)
    if number == 0:
        return student.sum()
    rows = max(CHUNK_ELEMENTS // (number * (number + student.shape[1] + teacher.shape[1])), 1)
    if rows >= number:
        return _angles(student, teacher, 0, number) / number**3
    parts = [
        checkpoint(
            _angles, student, teacher, start, min(start + rows, number), use_reentrant=False, preserve_rng_state=False
        )
        for start in range(0, number, rows)
    ]
    return torch.stack(parts).sum() / number**3


@dataclass(frozen=True)
class RKD:
    """Relational distillation of Park et al. (2019): distances and angles between samples.

    Args:
        distance: Weight of :func:`distance_relation`; the authors' 1 (their experiments use 25 to 1 beside labels).
        angle: Weight of :func:`angle_relation`; 2 as the authors have it. 0 leaves its ``B ** 3`` work out.

    Raises:
        ValueError: If a weight is negative.
    """

    distance: float = 1.0
    angle: float = 2.0

    def __post_init__(self) -> None:
        for name, value in {"distance": self.distance, "angle": self.angle}.items():
            if not value >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar."""
        student, teacher = samples(student, teacher, mask)
        value = student.sum() * 0
        if self.distance:
            value = value + self.distance * distance_relation(student, teacher)
        if self.angle:
            value = value + self.angle * angle_relation(student, teacher)
        return value


@without_autocast
def probabilistic_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""KL divergence between the neighbourhoods of each sample: PKT of Passalis and Tefas (2018).

    The probability of ``j`` as a neighbour of ``i`` is proportional to ``(cos(i, j) + 1) / 2`` (sections 3.1 and 3.2,
    https://arxiv.org/abs/1803.10837); a sample is none of its own neighbours here.

    Args:
        student: Shape ``(B, *P_S, d_S)``; the only input that gets a gradient.
        teacher: Shape ``(B, *P_T, d_T)``; detached here.
        mask: Which positions count, boolean.

    Returns:
        Scalar, nats, mean over the samples; 0 for fewer than three samples, which have no choice.
    """
    student, teacher = samples(student, teacher, mask)
    if len(student) < 3:
        return student.sum() * 0
    q, p = (_neighbourhood(side) for side in (student, teacher))
    return (torch.xlogy(p, p) - p * q.log()).sum(dim=-1).mean()


def _centred_unit(rows: Tensor) -> Tensor:
    """Rows of mean 0 and length 1; those that are constant up to rounding become 0."""
    centred = rows - rows.mean(dim=-1, keepdim=True)
    rounding = 8 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True)
    known = torch.linalg.vector_norm(centred.detach(), dim=-1, keepdim=True) > rounding
    return unit(centred).where(known, 0)


def _scaled_distances(vectors: Tensor) -> Tensor:
    """Distances between all vectors over their mean, 0 where all are equal."""
    vectors = vectors - vectors.detach().mean(dim=0)  # large levels would round the small distances away
    square = vectors.square().sum(dim=-1)
    squared = square.unsqueeze(1) + square - 2 * vectors @ vectors.T
    rounding = 4 * torch.finfo(vectors.dtype).eps * square.detach().max()
    apart = squared.detach() > rounding
    distances = squared.where(apart, 1).sqrt().where(apart, 0)
    mean = distances.sum() / apart.sum().clamp_min(1)
    return distances / mean.where(mean > 0, 1)


def _angles(student: Tensor, teacher: Tensor, start: int, stop: int) -> Tensor:
    """Sum of the Huber losses of the angles at the samples from ``start`` to ``stop``."""
    cosines = []
    for side in (student, teacher):
        directions = unit(side.unsqueeze(0) - side[start:stop].unsqueeze(1))
        cosines.append(directions @ directions.transpose(1, 2))
    return F.smooth_l1_loss(cosines[0], cosines[1], reduction="sum")


def _neighbourhood(vectors: Tensor) -> Tensor:
    vectors = unit(vectors)
    others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    kernel = ((vectors @ vectors.T + 1) / 2).clamp_min(1e-7).where(others, 0)
    q = kernel / kernel.sum(dim=-1, keepdim=True)
    return q.where(others, 1e-7)  # the logarithm of what has no probability on either side
