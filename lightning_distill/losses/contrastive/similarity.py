"""How alike two vectors are."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_distill.losses.distances.inputs import unit, without_autocast
from lightning_distill.losses.lazy import Lazy, Shape

Similarity = Callable[[Tensor, Tensor], Tensor]
"""``similarity(student, candidates)`` of ``(..., N, d_S)`` and ``(..., M, d_T)``, shape ``(..., N, M)``."""


@without_autocast
def cosine_similarity(student: Tensor, candidates: Tensor) -> Tensor:
    """Cosine of the angle between each two vectors, from -1 to 1; 0 for a vector without a direction.

    Args:
        student: Shape ``(..., N, d)``.
        candidates: Shape ``(..., M, d)``.

    Returns:
        Shape ``(..., N, M)``, in float32 or wider.

    Raises:
        ValueError: If the widths differ.
    """
    if student.shape[-1] != candidates.shape[-1]:
        raise ValueError(
            f"A cosine needs vectors of one width, got {student.shape[-1]} for the student and "
            f"{candidates.shape[-1]} for the teacher. Use `similarity='bilinear'`, or `transform='linear'`."
        )
    wide = torch.promote_types(torch.promote_types(student.dtype, candidates.dtype), torch.float32)
    similarity: Tensor = unit(student.to(wide)) @ unit(candidates.to(wide)).transpose(-1, -2)
    return similarity


class BilinearSimilarity(Lazy):
    """``a^T W b`` with a trained ``W`` of shape ``(d_S, d_T)``: the widths may differ (van den Oord et al. 2018).

    ``W`` starts such that vectors of unit variance have similarities of about unit variance.
    """

    def make(self, *shapes: Shape) -> None:
        """A matrix between the last numbers of the two shapes."""
        student, teacher = (shape[-1] for shape in shapes)
        self.weight = nn.Parameter(torch.randn(student, teacher) / math.sqrt(student * teacher))

    def forward(self, student: Tensor, candidates: Tensor) -> Tensor:
        """Shape ``(..., N, M)``, in float32 or wider."""
        wide = torch.promote_types(torch.promote_types(student.dtype, candidates.dtype), torch.float32)
        with torch.autocast(student.device.type, enabled=False):
            similarity: Tensor = (student.to(wide) @ self.weight.to(wide)) @ candidates.to(wide).transpose(-1, -2)
        return similarity


def build_similarity(similarity: str | nn.Module) -> nn.Module | Similarity:
    """A similarity by its name, or as it is.

    Raises:
        ValueError: If the name is unknown.
    """
    if isinstance(similarity, nn.Module):
        return similarity
    if similarity not in ("cosine", "bilinear"):
        raise ValueError(f"`similarity` must be 'cosine', 'bilinear' or a module, got {similarity!r}.")
    return BilinearSimilarity() if similarity == "bilinear" else cosine_similarity
