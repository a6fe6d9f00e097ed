"""Distances between maps and sequences as wholes: where a network looks, at which scales and frequencies it varies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.distances.inputs import (
    same_positions,
    same_shape,
    unit,
    without_autocast,
    zero_where_masked,
)


def attention_transfer(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Where activations are large: AT of Zagoruyko and Komodakis (2017), activation based.

    Each position's sum of squares over the channels, the whole map brought to length 1, squared difference, mean over
    the positions, as in the authors' code (section 3.1, https://arxiv.org/abs/1612.03928; their weight is 1000). The
    widths may differ.

    Args:
        student: Shape ``(B, *P, d_S)``; the only input that gets a gradient.
        teacher: Shape ``(B, *P, d_T)``; detached here.
        mask: Which positions count, boolean, ``(B, *P)``.

    Returns:
        One value per sample, ``(B,)``, in float32 or wider.

    Raises:
        ValueError: If the positions differ.
    """
    student, teacher = same_positions(student, teacher)
    maps = []
    for side in (student, teacher):
        energy = zero_where_masked(side, mask).square().mean(dim=-1)
        maps.append(unit(energy.reshape(len(energy), -1)))
    return _mean((maps[0] - maps[1]).square(), mask)


@dataclass(frozen=True)
class HierarchicalContext:
    """Squared difference of maps at several resolutions: the loss of ReviewKD (Chen et al. 2021, HCL).

    The maps themselves with weight 1, and their averages over ``levels`` bins in each direction with 1/2, 1/4, and so
    on, over the sum of the weights (section 3.3, https://arxiv.org/abs/2104.09044). Levels as large as the map are left
    out. The paper's fusion of layers is not part of a distance: pair several layers of the student instead.

    Args:
        levels: Numbers of bins, one or more.

    Raises:
        ValueError: If ``levels`` holds no positive numbers; when called, if the shapes differ.
    """

    levels: Sequence[int] = (4, 2, 1)

    def __post_init__(self) -> None:
        if len(self.levels) == 0 or not all(level >= 1 for level in self.levels):
            raise ValueError(f"`levels` must be one or more positive numbers of bins, got {list(self.levels)}.")

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per sample, ``(B,)``, of features ``(B, *P, d)`` with one to three dimensions of positions."""
        student, teacher = same_shape(student, teacher)
        dimensions = student.ndim - 2
        if not 1 <= dimensions <= 3:
            raise ValueError(f"Features must have one to three dimensions of positions, got {tuple(student.shape)}.")
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[dimensions - 1]
        # The average is linear: pooling the difference once does for both sides.
        difference = zero_where_masked(student - teacher, mask)
        value = _mean(difference.square().mean(dim=-1), mask)
        difference, total, weight = difference.movedim(-1, 1), 1.0, 1.0
        for level in self.levels:
            if level >= min(student.shape[1:-1]):
                continue
            weight /= 2
            pooled = pool(difference, [level] * dimensions if dimensions > 1 else level)  # type: ignore[arg-type]
            counted = None
            if mask is not None:
                share = pool(mask.unsqueeze(1).to(pooled.dtype), [level] * dimensions if dimensions > 1 else level)  # type: ignore[arg-type]
                pooled, counted = pooled / share.where(share > 0, 1), (share > 0).squeeze(1)
            value = value + weight * _mean(pooled.square().mean(dim=1), counted)
            total += weight
        return value / total


@without_autocast
def spectral_distance(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    compare: Literal["magnitude", "complex"] = "magnitude",
    band_weights: Sequence[float] | None = None,
) -> Tensor:
    r"""Squared difference of the Fourier transforms along the positions.

    ``"complex"`` without weights is the squared difference of the features themselves, by Parseval's theorem, and says
    nothing new; weights of the bands, or the magnitudes alone, do: magnitudes are blind to circular shifts.

    Args:
        student: Shape ``(B, *P, d)``; the only input that gets a gradient.
        teacher: Same shape; detached here.
        mask: Which positions count, boolean, ``(B, *P)``; the others are set to zero before the transform.
        compare: ``"magnitude"`` or ``"complex"``.
        band_weights: Weights of as many bands of equal width, from constant to the highest frequency; by default 1.

    Returns:
        One value per sample, ``(B,)``, in float32 or wider, over the number of positions that count and the width: on
        the scale of the squared difference.

    Raises:
        ValueError: If the shapes differ, there are no positions, ``compare`` is unknown or a weight is negative.
    """
    if compare not in ("magnitude", "complex"):
        raise ValueError(f"`compare` must be 'magnitude' or 'complex', got {compare!r}.")
    student, teacher = same_shape(student, teacher)
    if student.ndim < 3:
        raise ValueError(f"Frequencies need features along positions, (B, *positions, d), got {tuple(student.shape)}.")
    positions = student.shape[1:-1]
    dims = tuple(range(1, student.ndim - 1))
    spectra = [torch.fft.rfftn(zero_where_masked(side, mask), dim=dims, norm="ortho") for side in (student, teacher)]
    if compare == "magnitude":
        difference = (spectra[0].abs() - spectra[1].abs()).square()
    else:
        difference = torch.view_as_real(spectra[0] - spectra[1]).square().sum(dim=-1)
    weights = _bin_weights(positions, band_weights).to(difference)
    summed = (difference.sum(dim=-1) * weights).flatten(1).sum(dim=1)
    counted: Tensor | int = math.prod(positions) if mask is None else mask.flatten(1).sum(dim=1).clamp_min(1)
    value: Tensor = summed / (counted * student.shape[-1])
    return value


@dataclass(frozen=True)
class Spectrum:
    """:func:`spectral_distance` as a distance with settings.

    Args:
        compare: See :func:`spectral_distance`.
        band_weights: See :func:`spectral_distance`.

    Raises:
        ValueError: If ``compare`` is unknown or a weight is negative.
    """

    compare: Literal["magnitude", "complex"] = "magnitude"
    band_weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.compare not in ("magnitude", "complex"):
            raise ValueError(f"`compare` must be 'magnitude' or 'complex', got {self.compare!r}.")
        _bin_weights((2,), self.band_weights)

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per sample, ``(B,)``."""
        return spectral_distance(student, teacher, mask, compare=self.compare, band_weights=self.band_weights)


def _bin_weights(positions: Sequence[int], band_weights: Sequence[float] | None) -> Tensor:
    """Weight of each bin of a real transform; inner bins of the last dimension stand for their mirror image too."""
    last = positions[-1]
    weights = torch.full((last // 2 + 1,), 2.0)
    weights[0] = 1.0
    if last % 2 == 0:
        weights[-1] = 1.0
    if band_weights is None:
        return weights.expand(*positions[:-1], -1)
    if len(band_weights) == 0 or not all(weight >= 0 for weight in band_weights):
        raise ValueError(f"`band_weights` must be one or more weights, none negative, got {list(band_weights)}.")
    axes = [torch.fft.fftfreq(size) for size in positions[:-1]] + [torch.fft.rfftfreq(last)]
    frequency = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(dim=0).sqrt()
    share = frequency / frequency.max().clamp_min(1e-9)
    band = (share * len(band_weights)).long().clamp_max(len(band_weights) - 1)
    return weights * torch.tensor(list(band_weights), dtype=torch.float32)[band]


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the positions of ``(B, *P)`` that count, ``(B,)``; those that do not must be 0."""
    summed = values.reshape(len(values), -1).sum(dim=1)
    if mask is None:
        return summed / max(values[0].numel() if len(values) else 1, 1)
    return summed / mask.flatten(1).sum(dim=1).clamp_min(1)
