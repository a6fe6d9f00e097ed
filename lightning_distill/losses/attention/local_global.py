"""Attention to neighbours and attention to the rest, weighted apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.losses.attention.rows import attention_kl, same_maps


@dataclass(frozen=True)
class LocalGlobalParts:
    """KL divergence of each row in three parts: ``mass + share * local + (1 - share) * distant``, nats.

    Attributes:
        mass: Divergence of the choice between neighbours and the rest.
        local: Divergence among the neighbours, each side brought to sum 1; 0 where the teacher sees none.
        distant: Divergence among the other keys.
        share: The teacher's attention to neighbours.
    """

    mass: Tensor
    local: Tensor
    distant: Tensor
    share: Tensor


def local_global_parts(student: Tensor, teacher: Tensor, *, window: int = 8) -> LocalGlobalParts:
    """Split the KL divergence from teacher to student by the chain rule.

    Pieces of a row that do not sum to 1 have no divergence (it may be negative); brought to sum 1 they have, and with
    the divergence of the two sums they make up the whole exactly.

    Args:
        student: Shape ``(..., queries, keys)``.
        teacher: Same shape; detached here.
        window: Largest distance of a neighbour; queries are the last positions where there are fewer than keys.

    Returns:
        Parts of shape ``(..., queries)``.

    Raises:
        ValueError: If the shapes differ or ``window`` is negative.
    """
    if not window >= 0:
        raise ValueError(f"`window` must not be negative, got {window}.")
    student, teacher = same_maps(student, teacher)
    queries, keys = student.shape[-2:]
    position = torch.arange(keys, device=student.device)
    near = (position[keys - queries :, None] - position).abs() <= window
    divergences, masses = [], []
    for inside in (near, ~near):
        pieces = [side.where(inside, 0) for side in (student, teacher)]
        sums = [piece.sum(dim=-1, keepdim=True) for piece in pieces]
        shares = [piece / total.where(total > 0, 1) for piece, total in zip(pieces, sums, strict=True)]
        seen = ((sums[0] > 0) & (sums[1] > 0)).squeeze(-1)
        divergences.append(attention_kl(*shares).where(seen, 0))
        masses.append(torch.stack(sums))
    of_student, of_teacher = torch.cat(masses, dim=-1)
    mass = attention_kl(of_student, of_teacher)
    return LocalGlobalParts(mass, divergences[0], divergences[1], of_teacher[..., 0])


@dataclass(frozen=True)
class LocalGlobal:
    """``alpha`` times the divergence among neighbours plus ``1 - alpha`` times that among the other keys.

    Args:
        window: See :func:`local_global_parts`.
        alpha: Weight of the neighbours, in [0, 1].
        mass_weight: Weight of the divergence of the choice between the two, not negative.

    Raises:
        ValueError: If an argument is outside its range.
    """

    window: int = 8
    alpha: float = 0.5
    mass_weight: float = 0.0

    def __post_init__(self) -> None:
        if not self.window >= 0:
            raise ValueError(f"`window` must not be negative, got {self.window}.")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha`, the weight of the neighbours, must be in [0, 1], got {self.alpha}.")
        if not self.mass_weight >= 0:
            raise ValueError(f"`mass_weight` must not be negative, got {self.mass_weight}.")

    def __call__(self, student: Tensor, teacher: Tensor, visible: Tensor | None = None) -> Tensor:
        """One value per row, ``(..., queries)``, nats."""
        parts = local_global_parts(student, teacher, window=self.window)
        value: Tensor = self.alpha * parts.local + (1 - self.alpha) * parts.distant + self.mass_weight * parts.mass
        return value
