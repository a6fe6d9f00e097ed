"""Distances at every position: what hints and hidden states are compared by.

Features have the channels last, ``(B, *P, d)``; each function returns one value per position, ``(B, *P)``, in float32
or wider, so that masks are the caller's. They compare number by number: the student goes through a transform first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.distances.inputs import same_shape, unit


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared difference, mean over the channels.

    With a transform of the student this is the hint loss of FitNets (Romero et al. 2015, section 2.2) and the
    hidden-state loss of TinyBERT (Jiao et al. 2020, section 3.1). The projection belongs to the student's side: one of
    the teacher could map everything to zero.

    Args:
        student: Shape ``(B, *P, d)``; the only input that gets a gradient.
        teacher: Same shape; detached here.
        mask: Not needed: positions do not touch each other.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
        tensor([2.])
    """
    student, teacher = same_shape(student, teacher)
    return (student - teacher).square().mean(dim=-1)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """One minus the cosine of the angle between the two vectors, from 0 to 2.

    As DistilBERT aligns hidden states (Sanh et al. 2019, section 3). Where the teacher's vector is zero it has no
    direction to teach: 0. Where only the student's is: 1, without a gradient.

    Args:
        student: Shape ``(B, *P, d)``; the only input that gets a gradient.
        teacher: Same shape; detached here.
        mask: Not needed.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    target = unit(teacher)
    return target.any(dim=-1).to(target.dtype) - (unit(student) * target).sum(dim=-1)


def normalized_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared distance between the two vectors brought to length 1, from 0 to 4: twice :func:`cosine`.

    The loss of patient distillation (Sun et al. 2019, PKD, equation 7).

    Args:
        student: Shape ``(B, *P, d)``; the only input that gets a gradient.
        teacher: Same shape; detached here.
        mask: Not needed.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_shape(student, teacher)
    return (unit(student) - unit(teacher)).square().sum(dim=-1)


def layer_norm(features: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``(h - mean) / sqrt(variance + eps) * gamma + beta`` over the last dimension (Ba et al. 2016), float32 or wider.

    Args:
        features: Shape ``(..., d)``.
        gamma: Shape ``(d,)``; 1 by default.
        beta: Shape ``(d,)``; 0 by default.
        eps: Added to the variance.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    gamma, beta = (None if part is None else part.to(features.dtype) for part in (gamma, beta))
    return F.layer_norm(features, features.shape[-1:], gamma, beta, eps)


def dual_norm(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, alpha: float = 0.3, eps: float = 1e-5
) -> Tensor:
    """``alpha`` times :func:`mse` of the features plus ``1 - alpha`` times that of the normalized features.

    The first part keeps the scale of what enters a layer norm, the second what leaves it. ``alpha=0`` is blind to the
    student's scale and level.

    Args:
        student: Shape ``(B, *P, d)``, before the norm; the only input that gets a gradient.
        teacher: Same shape; detached here.
        mask: Not needed.
        alpha: Weight of the first part, in [0, 1].
        eps: Of the layer norm.

    Raises:
        ValueError: If the shapes differ or ``alpha`` is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha`, the weight of the features before the norm, must be in [0, 1], got {alpha}.")
    student, teacher = same_shape(student, teacher)
    before = (student - teacher).square().mean(dim=-1)
    after = (layer_norm(student, eps=eps) - layer_norm(teacher, eps=eps)).square().mean(dim=-1)
    return alpha * before + (1 - alpha) * after
