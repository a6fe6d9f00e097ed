"""Negatives by noise."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.contrastive.info_nce import check_temperature, info_nce
from lightning_distill.losses.contrastive.similarity import build_similarity
from lightning_distill.losses.distances.inputs import mean_of_positions, upcast
from lightning_distill.losses.lazy import Lazy, Shape


def perturbed(
    vectors: Tensor, *, sigma: float = 1.0, number: int = 16, generator: torch.Generator | None = None
) -> Tensor:
    """Copies of ``vectors`` with normal noise, to serve as negatives.

    Args:
        vectors: Shape ``(N, d)``.
        sigma: Standard deviation of the noise over that of each feature over the ``N`` vectors (of a single vector:
            over its features). Far below 1 a negative is the positive, and the loss has a floor of ``log(1 + number)``.
        number: Copies of each, positive.
        generator: Source of randomness.

    Returns:
        Shape ``(N, number, d)``, without a graph, in float32 or wider.
    """
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    scale = vectors.std(dim=0 if len(vectors) > 1 else -1, unbiased=False, keepdim=True)
    noise = torch.randn(
        len(vectors), number, vectors.shape[-1], dtype=vectors.dtype, device=vectors.device, generator=generator
    )
    return vectors.unsqueeze(1) + sigma * scale.unsqueeze(1) * noise


class PerturbationInfoNCE(Lazy):
    """:func:`info_nce` against noisy copies of the teacher's own features, as a distance; see :func:`perturbed`.

    Args:
        sigma: Of the noise, relative to the features' spread; below 0.3 a warning tells of the floor of the loss.
        number: Negatives of each sample, positive.
        temperature: See :func:`info_nce`.
        similarity: See :class:`InfoNCE`.
        include_positive: See :func:`info_nce`.

    Raises:
        ValueError: If an argument is outside its range or ``similarity`` is unknown.
    """

    def __init__(
        self,
        sigma: float = 1.0,
        number: int = 16,
        temperature: float = 0.07,
        similarity: Literal["cosine", "bilinear"] | nn.Module = "cosine",
        include_positive: bool = True,
    ) -> None:
        super().__init__()
        if not sigma >= 0:
            raise ValueError(f"`sigma` must not be negative, got {sigma}.")
        if not number >= 1:
            raise ValueError(f"`number` must be positive, got {number}.")
        check_temperature(temperature)
        if sigma < 0.3:
            warnings.warn(
                f"`sigma={sigma}` makes negatives that are nearly the positive: the loss cannot fall much below "
                f"log({1 + number}). Use 1 or so.",
                stacklevel=2,
            )
        self.sigma = sigma
        self.number = number
        self.temperature = temperature
        self.similarity = build_similarity(similarity)
        self.include_positive = include_positive

    def make(self, *shapes: Shape) -> None:
        """The similarity's parameters."""
        if isinstance(self.similarity, Lazy):
            self.similarity.build(*shapes)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per sample, ``(B,)``, of features pooled over their positions."""
        student, teacher = (mean_of_positions(side, mask) for side in upcast(student, teacher))
        candidates = torch.cat([teacher.unsqueeze(1), perturbed(teacher, sigma=self.sigma, number=self.number)], dim=1)
        values = info_nce(
            self.similarity(student.unsqueeze(1), candidates),
            torch.zeros(1, dtype=torch.long, device=student.device),
            temperature=self.temperature,
            include_positive=self.include_positive,
        ).squeeze(-1)
        return values.where(mask.flatten(1).any(dim=1), 0) if mask is not None and mask.ndim > 1 else values
