"""What every distance does to its two inputs first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` outside of autocast, which would multiply float32 matrices in half precision."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return run


def upcast(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider and of one type, the teacher detached."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(wide), teacher.detach().to(wide)


def same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`upcast`, for distances that compare number by number.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's features have the shape {tuple(student.shape)} after their transform, the teacher's "
            f"{tuple(teacher.shape)}. Use `transform='linear'`, which maps one width to the other, a distance between "
            "samples (such as `linear_cka`), or other layers; 1-d convolutions need `channel_dim=1`."
        )
    return upcast(student, teacher)


def same_positions(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`upcast`, for distances that take any two widths.

    Raises:
        ValueError: If samples or positions differ.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "Student and teacher must have features for the same samples and positions, got shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)} with the channels last."
        )
    return upcast(student, teacher)


def samples(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One vector per sample: the mean over its positions that count. Samples without any are left out.

    Args:
        student: Shape ``(B, *P, d_S)``.
        teacher: Shape ``(B, *P', d_T)``; detached.
        mask: Which of the positions ``P`` count, boolean; used for a side that has such positions.

    Returns:
        Shapes ``(n, d_S)`` and ``(n, d_T)``, float32 or wider.

    Raises:
        ValueError: If the numbers of samples differ.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"Student and teacher must have features of the same samples, got {len(student)} and {len(teacher)}."
        )
    student, teacher = upcast(student, teacher)
    pooled = [mean_of_positions(side, mask) for side in (student, teacher)]
    if mask is not None and mask.ndim > 1:
        counts = mask.flatten(1).any(dim=1)
        pooled = [side[counts] for side in pooled]
    return pooled[0], pooled[1]


def mean_of_positions(features: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over the positions of ``(B, *P, d)`` that count, shape ``(B, d)``; 0 where there are none."""
    if features.ndim == 2:
        return features
    if mask is None or mask.shape != features.shape[:-1]:
        return features.flatten(1, -2).mean(dim=1)
    weights = mask.flatten(1).to(features.dtype)
    summed = torch.einsum("bp,bpd->bd", weights, zero_where_masked(features, mask).flatten(1, -2))
    return summed / weights.sum(dim=1, keepdim=True).clamp_min(1)


def zero_where_masked(features: Tensor, mask: Tensor | None) -> Tensor:
    """``features`` with zeros at the positions that do not count, whatever stood there."""
    return features if mask is None else features.where(mask.unsqueeze(-1), 0)


def unit(vectors: Tensor, dim: int | tuple[int, ...] = -1, eps: float = 1e-8) -> Tensor:
    """``vectors`` of length 1; those shorter than ``eps`` become 0 and get no gradient, as they have no direction."""
    norm = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    known = norm > eps
    return torch.where(known, vectors / norm.where(known, 1), 0)
