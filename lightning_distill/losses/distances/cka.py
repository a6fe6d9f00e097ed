"""Centred kernel alignment: how alike two networks arrange the same samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.losses.distances.inputs import samples, upcast, without_autocast


@without_autocast
def linear_cka(student: Tensor, teacher: Tensor, *, debiased: bool = False) -> Tensor:
    r"""Linear centred kernel alignment of two sets of features of the same samples.

    .. math:: \frac{\|\bar T^T \bar S\|_F^2}{\|\bar S^T \bar S\|_F \, \|\bar T^T \bar T\|_F}

    with centred columns (Kornblith et al. 2019, equation 5, https://arxiv.org/abs/1905.00414). Rotations and scales of
    either side do not change it. For few samples and many features it is near 1 whatever they are;
    ``debiased`` uses unbiased estimates of the three parts (Song et al. 2012; Nguyen et al. 2021); it may be negative.

    Args:
        student: Shape ``(N, d_S)``; the only input that gets a gradient.
        teacher: Shape ``(N, d_T)``; detached here.
        debiased: Whether to correct for the number of samples, of which it needs four.

    Returns:
        Scalar, in float32 or wider; 0 where a side is constant.

    Raises:
        ValueError: If the numbers of samples differ, or are too few for ``debiased``.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
        >>> round(float(linear_cka(features, -3 * features.flip(1))), 4)
        1.0
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise ValueError(
            f"CKA compares (samples, features) of the same samples, got shapes {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )
    number = len(student)
    if debiased and number < 4:
        raise ValueError(f"`debiased` needs four samples, got {number}; use larger batches or the plain estimate.")
    sides = [side - side.mean(dim=0) if number else side for side in upcast(student, teacher)]
    varies = [_varies(centred, side) for centred, side in zip(sides, (student, teacher), strict=True)]
    student, teacher = sides  # the debiased estimate does not need centred sides, its rounding does
    if debiased:
        grams = [side @ side.T for side in (student, teacher)]
        cross, own, theirs = (_unbiased_hsic(grams[a], grams[b]) for a, b in ((0, 1), (0, 0), (1, 1)))
    elif number < max(student.shape[1], teacher.shape[1]):
        grams = [side @ side.T for side in (student, teacher)]
        cross, own, theirs = ((grams[a] * grams[b]).sum() for a, b in ((0, 1), (0, 0), (1, 1)))
    else:
        cross, own, theirs = (
            (a.T @ b).square().sum() for a, b in ((teacher, student), (student, student), (teacher, teacher))
        )
    tiny = torch.finfo(own.dtype).tiny
    known = varies[0] & varies[1] & (own > tiny) & (theirs > tiny)
    scale = own.where(known, 1).sqrt() * theirs.where(known, 1).sqrt()
    return (cross / scale).where(known, 0)


@dataclass(frozen=True)
class CKA:
    """One minus :func:`linear_cka` over the samples of the batch, pooled over their positions.

    Args:
        debiased: See :func:`linear_cka`. Batches with fewer than four samples that count give 0.
    """

    debiased: bool = False

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar; any two widths."""
        student, teacher = samples(student, teacher, mask)
        if len(student) < (4 if self.debiased else 2):
            return student.sum() * 0
        alignment: Tensor = linear_cka(student, teacher, debiased=self.debiased)
        return 1 - alignment


def _varies(centred: Tensor, features: Tensor) -> Tensor:
    """Whether something but rounding is left of ``features`` without their mean."""
    rounding = 8 * torch.finfo(centred.dtype).eps * torch.linalg.vector_norm(features.detach().to(centred.dtype))
    varies: Tensor = torch.linalg.vector_norm(centred.detach()) > rounding
    return varies


def _unbiased_hsic(k: Tensor, m: Tensor) -> Tensor:
    """Unbiased HSIC of two Gram matrices, times ``n (n - 3)`` (Song et al. 2012, equation 5)."""
    n = len(k)
    k, m = (gram - torch.diag(gram.diagonal()) for gram in (k, m))
    rows = k.sum(dim=0) @ m.sum(dim=0)
    value: Tensor = (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)
    return value
