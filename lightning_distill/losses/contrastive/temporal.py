"""Negatives from other positions of the same sequence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.contrastive.info_nce import check_temperature, info_nce
from lightning_distill.losses.contrastive.similarity import build_similarity
from lightning_distill.losses.distances.inputs import upcast
from lightning_distill.losses.lazy import Lazy, Shape


def temporal_exclusions(length: int, min_gap: int = 1, device: torch.device | None = None) -> Tensor:
    """Positions too near to be negatives of each other, boolean, ``(length, length)``.

    Args:
        length: Of the sequence.
        min_gap: Smallest distance of a negative. Neighbours are often near duplicates.
        device: Of the result.

    Raises:
        ValueError: If ``min_gap`` is not positive.
    """
    if not min_gap >= 1:
        raise ValueError(f"`min_gap` must be positive, got {min_gap}.")
    position = torch.arange(length, device=device)
    return (position.unsqueeze(1) - position).abs() < min_gap


class TemporalInfoNCE(Lazy):
    """:func:`info_nce` within sequences, as a distance: the negatives are the other positions of the same sequence.

    Args:
        min_gap: Smallest distance of a negative, positive.
        temperature: See :func:`info_nce`.
        similarity: See :class:`InfoNCE`.
        include_positive: See :func:`info_nce`.

    Raises:
        ValueError: If an argument is not positive or ``similarity`` is unknown.
    """

    def __init__(
        self,
        min_gap: int = 2,
        temperature: float = 0.07,
        similarity: Literal["cosine", "bilinear"] | nn.Module = "cosine",
        include_positive: bool = True,
    ) -> None:
        super().__init__()
        temporal_exclusions(1, min_gap)
        check_temperature(temperature)
        self.min_gap = min_gap
        self.temperature = temperature
        self.similarity = build_similarity(similarity)
        self.include_positive = include_positive

    def make(self, *shapes: Shape) -> None:
        """The similarity's parameters."""
        if isinstance(self.similarity, Lazy):
            self.similarity.build(*shapes)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per position, ``(B, T)``, of features ``(B, T, d)``; 0 for positions that do not count."""
        if student.ndim != 3 or student.shape[:2] != teacher.shape[:2]:
            raise ValueError(
                "Temporal negatives are positions of the same sequences, (B, T, d), got shapes "
                f"{tuple(student.shape)} and {tuple(teacher.shape)}."
            )
        student, teacher = upcast(student, teacher)
        excluded = temporal_exclusions(student.shape[1], self.min_gap, student.device)
        if mask is not None:
            student, teacher = (side.where(mask.unsqueeze(-1), 0) for side in (student, teacher))
            excluded = excluded | ~mask.unsqueeze(1)
        values = info_nce(
            self.similarity(student, teacher),
            temperature=self.temperature,
            excluded=excluded,
            include_positive=self.include_positive,
        )
        return values if mask is None else values.where(mask, 0)
