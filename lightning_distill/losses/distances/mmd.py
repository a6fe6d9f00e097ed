"""Maximum mean discrepancy: whether two sets of vectors could come from one distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.losses.distances.inputs import samples, unit, upcast, without_autocast, zero_where_masked

Kernel = Literal["rbf", "linear", "poly"]


@without_autocast
def mmd2(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Kernel = "rbf",
    sigma: float | Literal["median"] = "median",
    bandwidths: Sequence[float] = (1.0,),
    degree: int = 2,
    offset: float = 0.0,
    unbiased: bool = False,
    student_mask: Tensor | None = None,
    teacher_mask: Tensor | None = None,
) -> Tensor:
    r"""Squared maximum mean discrepancy :math:`\|\mu_S - \mu_T\|^2_H` of two sets of vectors.

    .. math:: E[k(s, s')] + E[k(t, t')] - 2 E[k(s, t)]

    Gretton et al. (2012), equations 3 (unbiased) and 5 (biased). The sets need not be of one size, and their order does
    not matter.

    Args:
        student: Shape ``(..., N, d)``; the only input that gets a gradient.
        teacher: Shape ``(..., M, d)``; detached here.
        kernel: ``"rbf"``: ``exp(-|x - y|^2 / (2 sigma^2))``; ``"linear"``: ``x . y``; ``"poly"``:
            ``(x . y + offset) ** degree``.
        sigma: Of ``"rbf"``, in units of the features; or the median distance between two vectors of both sets together,
            without a gradient.
        bandwidths: Factors of ``sigma``; the kernel is the mean over them.
        degree: Of ``"poly"``.
        offset: Of ``"poly"``.
        unbiased: Leave pairs of a vector with itself out. Right on average, but may be negative.
        student_mask: Which of the ``N`` vectors count, boolean, shape ``(..., N)``.
        teacher_mask: Which of the ``M`` vectors count.

    Returns:
        Shape ``(...)``, in float32 or wider; 0 where a set is empty, or too small for ``unbiased``.

    Raises:
        ValueError: If the widths differ, ``kernel`` is unknown or a bandwidth is not positive.

    Example:
        >>> mmd2(torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [1.0]]), kernel="linear")
        tensor(1.)
    """
    _check(student, teacher, kernel, sigma, bandwidths)
    student, teacher = upcast(student, teacher)
    sizes = (student.shape[-2], teacher.shape[-2])
    weights = [
        torch.ones(side.shape[:-1], dtype=side.dtype, device=side.device) if mask is None else mask.to(side.dtype)
        for side, mask in ((student, student_mask), (teacher, teacher_mask))
    ]
    both = torch.cat([zero_where_masked(student, student_mask), zero_where_masked(teacher, teacher_mask)], dim=-2)
    counts = torch.cat(weights, dim=-1)
    if kernel == "rbf":
        # A common shift changes no distance, and large levels would round the small ones away.
        level = (both.detach() * counts.unsqueeze(-1)).sum(-2, keepdim=True)
        both = both - level / counts.sum(-1)[..., None, None].clamp_min(1)
        distances = _squared_distances(both)
        squared_sigma = _median_square(distances.detach(), counts) if sigma == "median" else float(sigma) ** 2
        scaled = distances / (2 * squared_sigma)
        gram = sum((torch.exp(scaled / -(factor**2)) for factor in bandwidths), torch.zeros_like(scaled))
        gram = gram / len(bandwidths)
    else:
        gram = both @ both.transpose(-1, -2)
        gram = gram if kernel == "linear" else (gram + offset) ** degree
    blocks = [row.split(sizes, dim=-1) for row in gram.split(sizes, dim=-2)]
    within = [
        _mean_of_pairs(blocks[side][side], weights[side], weights[side], without_self=unbiased) for side in (0, 1)
    ]
    value = within[0] + within[1] - 2 * _mean_of_pairs(blocks[0][1], *weights, without_self=False)
    smallest = 2 if unbiased else 1
    enough = (weights[0].sum(-1) >= smallest) & (weights[1].sum(-1) >= smallest)
    return value.where(enough, 0)


@dataclass(frozen=True)
class MMD:
    """:func:`mmd2` between the student's and the teacher's features, as a distance.

    Args:
        over: ``"samples"``: of the batch, pooled over their positions; one value per batch, which depends on its size.
            ``"positions"``: of each sample; one value per sample, and ``P x P`` numbers for it.
        kernel: See :func:`mmd2`, as for the rest.
        sigma: See :func:`mmd2`.
        bandwidths: See :func:`mmd2`.
        unbiased: See :func:`mmd2`.

    Raises:
        ValueError: If ``over`` or ``kernel`` is unknown, or a bandwidth not positive.
    """

    over: Literal["samples", "positions"] = "samples"
    kernel: Kernel = "rbf"
    sigma: float | Literal["median"] = "median"
    bandwidths: Sequence[float] = (0.5, 1.0, 2.0)
    unbiased: bool = False

    def __post_init__(self) -> None:
        if self.over not in ("samples", "positions"):
            raise ValueError(f"`over` must be 'samples' or 'positions', got {self.over!r}.")
        nothing = torch.zeros(1, 1)
        _check(nothing, nothing, self.kernel, self.sigma, self.bandwidths)

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar, or one value per sample; widths must be equal."""
        if self.over == "samples" or student.ndim == 2:
            student, teacher = samples(student, teacher, mask)
            masks: tuple[Tensor | None, Tensor | None] = (None, None)
        else:
            flat = [
                None if mask is None or mask.shape != side.shape[:-1] else mask.flatten(1)
                for side in (student, teacher)
            ]
            student, teacher = student.flatten(1, -2), teacher.flatten(1, -2)
            masks = (flat[0], flat[1])
        return mmd2(
            student,
            teacher,
            kernel=self.kernel,
            sigma=self.sigma,
            bandwidths=self.bandwidths,
            unbiased=self.unbiased,
            student_mask=masks[0],
            teacher_mask=masks[1],
        )


@without_autocast
def neuron_selectivity(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Discrepancy of where the channels of the two networks are active: NST of Huang and Wang (2017).

    :func:`mmd2` between the channels of each sample, with the kernel :math:`(x^T y)^2` and each channel's map over the
    positions brought to length 1 (section 4.2, https://arxiv.org/abs/1707.01219). Widths may differ.

    Args:
        student: Shape ``(B, *P, d_S)``; the only input that gets a gradient.
        teacher: Shape ``(B, *P, d_T)``; detached here.
        mask: Which positions count, boolean, ``(B, *P)``.

    Returns:
        One value per sample, ``(B,)``, at least 0 up to rounding.

    Raises:
        ValueError: If the positions differ.
    """
    maps = []
    for side in _with_positions(student, teacher):
        side = zero_where_masked(side, mask).flatten(1, -2)
        maps.append(unit(side, dim=1) / math.sqrt(side.shape[-1]))  # the mean over pairs of channels
    s, t = maps
    return _squared_products(s, s) + _squared_products(t, t) - 2 * _squared_products(s, t)


def _with_positions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape[:-1] != teacher.shape[:-1] or student.ndim < 3:
        raise ValueError(
            "`neuron_selectivity` compares maps over the same positions, (B, *positions, d), got shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    return upcast(student, teacher)


def _squared_products(a: Tensor, b: Tensor) -> Tensor:
    """``sum_ij (a_i . b_j)^2`` over the columns of ``(B, P, d)``, by the smaller of the two possible products."""
    positions, widths = a.shape[1], max(a.shape[2], b.shape[2])
    if positions < widths:
        return ((a @ a.transpose(1, 2)) * (b @ b.transpose(1, 2))).sum(dim=(1, 2))
    return (a.transpose(1, 2) @ b).square().sum(dim=(1, 2))


def _squared_distances(x: Tensor) -> Tensor:
    square = x.square().sum(dim=-1)
    return (square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * x @ x.transpose(-1, -2)).clamp_min(0)


def _median_square(distances: Tensor, counts: Tensor) -> Tensor:
    """Square of the median distance between two different vectors that count, shape ``(..., 1, 1)``; 1 if it is 0."""
    size = distances.shape[-1]
    row, column = torch.triu_indices(size, size, offset=1, device=distances.device)
    values = distances[..., row, column].sqrt()
    counted = counts[..., row] * counts[..., column] > 0
    values = values.masked_fill(~counted, math.inf).sort(dim=-1).values
    number = counted.sum(dim=-1, keepdim=True)
    if values.shape[-1] == 0:
        return distances.new_ones(*distances.shape[:-2], 1, 1)
    middle = [((number - 1 + more) // 2).clamp(0, values.shape[-1] - 1) for more in (0, 1)]
    median = (values.gather(-1, middle[0]) + values.gather(-1, middle[1])) / 2
    return median.where(median.isfinite() & (median > 0), 1).square().unsqueeze(-1)


def _mean_of_pairs(gram: Tensor, rows: Tensor, columns: Tensor, *, without_self: bool) -> Tensor:
    pairs = rows.unsqueeze(-1) * columns.unsqueeze(-2)
    if without_self:
        pairs = pairs - torch.diag_embed(rows)
    return (gram * pairs).sum(dim=(-1, -2)) / pairs.sum(dim=(-1, -2)).clamp_min(1)


def _check(student: Tensor, teacher: Tensor, kernel: str, sigma: float | str, bandwidths: Sequence[float]) -> None:
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"MMD compares vectors of one width, got {student.shape[-1]} for the student and {teacher.shape[-1]} for "
            "the teacher. Use `transform='linear'`, or `linear_cka`, which takes any two widths."
        )
    if kernel not in ("rbf", "linear", "poly"):
        raise ValueError(f"`kernel` must be 'rbf', 'linear' or 'poly', got {kernel!r}.")
    if sigma != "median" and (isinstance(sigma, str) or not 0 < sigma < math.inf):
        raise ValueError(f"`sigma` must be positive and finite or 'median', got {sigma!r}.")
    if len(bandwidths) == 0 or not all(factor > 0 for factor in bandwidths):
        raise ValueError(f"`bandwidths` must be one or more positive factors of `sigma`, got {list(bandwidths)}.")
