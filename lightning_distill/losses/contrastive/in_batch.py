"""Negatives from the batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.contrastive.info_nce import check_temperature, info_nce
from lightning_distill.losses.contrastive.similarity import build_similarity
from lightning_distill.losses.distances.inputs import mean_of_positions, upcast
from lightning_distill.losses.lazy import Lazy, Shape
from lightning_distill.losses.ranks import gather_rows
from lightning_distill.outputs import UNLABELLED


class InfoNCE(Lazy):
    """:func:`info_nce` between samples, as a distance: the negatives are the other samples of the batch.

    Sequences and maps are pooled over their positions first. With several processes the teacher's features are
    gathered, so that the negatives are those of all processes, and the gradient is that of one process with the whole
    batch. It depends on how a step is split into micro-batches, as each of them has its own negatives.

    Args:
        temperature: See :func:`info_nce`.
        similarity: ``"cosine"``, ``"bilinear"`` (see :class:`BilinearSimilarity`), or a function or module.
        include_positive: See :func:`info_nce`.
        gather: Whether other processes' samples are negatives too.

    Raises:
        ValueError: If ``temperature`` is not positive or ``similarity`` is unknown.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        similarity: Literal["cosine", "bilinear"] | nn.Module = "cosine",
        include_positive: bool = True,
        gather: bool = True,
    ) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature
        self.similarity = build_similarity(similarity)
        self.include_positive = include_positive
        self.gather = gather

    def make(self, *shapes: Shape) -> None:
        """The similarity's parameters."""
        if isinstance(self.similarity, Lazy):
            self.similarity.build(*shapes)

    def forward(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """One value per sample, ``(B,)``; 0 for samples without a position that counts.

        Args:
            student: Shape ``(B, *P, d_S)``.
            teacher: Shape ``(B, *P, d_T)``; detached here.
            mask: Which positions count, boolean, ``(B, *P)``.
            labels: Class of each sample, ``(B,)``; others of the same class are then no negatives.
        """
        student, teacher = (mean_of_positions(side, mask) for side in upcast(student, teacher))
        counts = torch.ones(len(student), dtype=torch.bool, device=student.device)
        if mask is not None and mask.ndim > 1:
            counts = mask.flatten(1).any(dim=1)
        everybody = [teacher, counts] if labels is None else [teacher, counts, labels]
        first = 0
        if self.gather:
            gathered = [gather_rows(part) for part in everybody]
            everybody, first = [rows for rows, _ in gathered], gathered[0][1]
        excluded = ~everybody[1].unsqueeze(0)
        if labels is not None:
            same = labels.unsqueeze(1) == everybody[2]
            excluded = excluded | (same & (labels != UNLABELLED).unsqueeze(1))
        values = info_nce(
            self.similarity(student, everybody[0]),
            first + torch.arange(len(student), device=student.device),
            temperature=self.temperature,
            excluded=excluded,
            include_positive=self.include_positive,
        )
        return values.where(counts, 0)
