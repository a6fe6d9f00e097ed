"""Features along a sequence: what belongs to the position and what to the content, and coarser sequences."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.losses.distances.distance import Distance
from lightning_distill.losses.distances.inputs import same_shape, zero_where_masked
from lightning_distill.losses.distances.pointwise import mse


def split_content_position(features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Split features into a part that every sample has at a position, and the rest: ``features = content + position``.

    The position is the mean over the batch at each position without the mean over everything, as in an analysis of
    variance; without such a definition the split is arbitrary. The content's mean over the batch is then the same at
    every position.

    Args:
        features: Shape ``(B, T, d)``.
        mask: Which positions count, boolean, ``(B, T)``; the means run over those.

    Returns:
        Content ``(B, T, d)`` and position ``(T, d)``, in float32 or wider; the position is 0 where no sample has one.
    """
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if mask is None:
        position = features.mean(dim=0) - features.mean(dim=(0, 1))
        return features - position, position
    kept, number = zero_where_masked(features, mask), mask.sum(dim=0).to(features.dtype)
    overall = kept.sum(dim=(0, 1)) / number.sum().clamp_min(1)
    position = kept.sum(dim=0) / number.clamp_min(1).unsqueeze(-1) - overall
    position = position.where((number > 0).unsqueeze(-1), 0)
    return features - position, position


@dataclass(frozen=True)
class ContentPosition:
    """Squared differences of content and of position apart, each with its weight; see :func:`split_content_position`.

    The position is a mean over the batch: of one sample alone, everything that changes along it is position.

    Args:
        content: Weight of the content, not negative.
        position: Weight of the position, not negative.

    Raises:
        ValueError: If a weight is negative; when called, if the features are no ``(B, T, d)`` or differ in shape.
    """

    content: float = 1.0
    position: float = 1.0

    def __post_init__(self) -> None:
        for name, value in {"content": self.content, "position": self.position}.items():
            if not value >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per position, ``(B, T)``."""
        student, teacher = same_shape(student, teacher)
        if student.ndim != 3:
            raise ValueError(f"Content and position are parts of sequences, (B, T, d), got {tuple(student.shape)}.")
        contents, positions = zip(*(split_content_position(side, mask) for side in (student, teacher)), strict=True)
        of_content = (contents[0] - contents[1]).square().mean(dim=-1)
        of_position = (positions[0] - positions[1]).square().mean(dim=-1)
        value: Tensor = self.content * of_content + self.position * of_position
        return value


def pool_sequence(
    features: Tensor, stride: int, mask: Tensor | None = None, *, ceil: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean over windows of ``stride`` positions, of those that count.

    Args:
        features: Shape ``(B, T, d)``.
        stride: Length of a window, positive.
        mask: Which positions count, boolean, ``(B, T)``.
        ceil: Whether the positions that do not fill a last window make a shorter one, or are left out.

    Returns:
        Means ``(B, W, d)``, and which windows hold something, boolean, ``(B, W)``. Empty windows are 0.

    Raises:
        ValueError: If ``stride`` is not positive or the features are no ``(B, T, d)``.

    Example:
        >>> pool_sequence(torch.arange(5.0).reshape(1, 5, 1), 2, ceil=True)[0].flatten()
        tensor([0.5000, 2.5000, 4.0000])
    """
    if not stride >= 1:
        raise ValueError(f"`stride` must be positive, got {stride}.")
    if features.ndim != 3:
        raise ValueError(f"Sequences have the shape (B, T, d), got {tuple(features.shape)}.")
    samples, length, width = features.shape
    if mask is None:
        mask = torch.ones(samples, length, dtype=torch.bool, device=features.device)
    features = zero_where_masked(features, mask)
    windows = -(-length // stride) if ceil else length // stride
    missing = windows * stride - length
    features, mask = F.pad(features, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    number = mask.reshape(samples, windows, stride).sum(dim=-1)
    summed = features.reshape(samples, windows, stride, width).sum(dim=2)
    return summed / number.clamp_min(1).unsqueeze(-1), number > 0


class PooledSequence(nn.Module):
    """Another distance between sequences that were averaged over windows first; see :func:`pool_sequence`.

    Args:
        stride: Length of a window, positive.
        distance: Of features ``(B, W, d)``, one value per position or per sample, or a scalar.

    Raises:
        ValueError: If ``stride`` is not positive.
    """

    def __init__(self, stride: int, distance: nn.Module | Distance = mse) -> None:
        super().__init__()
        if not stride >= 1:
            raise ValueError(f"`stride` must be positive, got {stride}.")
        self.stride = stride
        self.distance = copy.deepcopy(distance)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per sample, ``(B,)``, or a scalar."""
        wide = torch.promote_types(student.dtype, torch.float32)
        student, counted = pool_sequence(student.to(wide), self.stride, mask, ceil=True)
        teacher, _ = pool_sequence(teacher.detach().to(wide), self.stride, mask, ceil=True)
        value: Tensor = self.distance(student, teacher, counted)
        if value.ndim < 2:
            return value
        return value.where(counted, 0).sum(dim=1) / counted.sum(dim=1).clamp_min(1)
