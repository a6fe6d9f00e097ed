"""What the length of a feature vector says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.estimates import Estimate
from lightning_distill.diagnostics.observations import float64


@dataclass(frozen=True)
class NormInformation:
    """What the length of a token's vector says, before and after a layer norm.

    Attributes:
        before: Pearson correlation of length and covariate before the norm, with Fisher's 95 % interval.
        after: The same after it.
        variation_before: Standard deviation of the lengths over their mean.
        variation_after: The same after the norm; near 0 if it removes the length.
    """

    before: Estimate
    after: Estimate
    variation_before: float
    variation_after: float


@torch.no_grad()
def norm_information(before: Tensor, after: Tensor, covariate: Tensor, mask: Tensor | None = None) -> NormInformation:
    """Correlation of the length of each token's vector with something, such as its position or logarithmic frequency.

    A layer norm without scale and shift gives all vectors the same length, and with it the length's information is
    gone; matching features before the norm keeps it. The scale of a trained norm brings some variation back.

    Args:
        before: Features before the norm, shape ``(..., d)``.
        after: Features after the norm, same shape.
        covariate: One number per token, shape ``(...)``.
        mask: Which tokens count, boolean, ``(...)``.

    Raises:
        ValueError: If the shapes do not fit or fewer than four tokens count.
    """
    if before.shape != after.shape or covariate.shape != before.shape[:-1]:
        raise ValueError(
            "`before` and `after` must have one shape and `covariate` one number per token, got "
            f"{tuple(before.shape)}, {tuple(after.shape)} and {tuple(covariate.shape)}."
        )
    keep = torch.ones(covariate.shape, dtype=torch.bool) if mask is None else mask.detach().cpu().bool()
    x = float64(covariate)[keep]
    if len(x) < 4:
        raise ValueError(f"At least four tokens must count, got {len(x)}.")
    lengths = [float64(side)[keep].norm(dim=-1) for side in (before, after)]
    variation = [(side.std(unbiased=False) / side.mean().clamp_min(1e-300)).item() for side in lengths]
    correlations = [_correlation(side, x, spread) for side, spread in zip(lengths, variation, strict=True)]
    return NormInformation(correlations[0], correlations[1], variation[0], variation[1])


def _correlation(lengths: Tensor, x: Tensor, variation: float) -> Estimate:
    n = len(x)
    a, b = lengths - lengths.mean(), x - x.mean()
    scale = (a.norm() * b.norm()).item()
    if scale == 0 or variation < 1e-9:  # what is left is rounding
        return Estimate(0.0, -math.inf, math.inf, n)
    r = max(min((a @ b).item() / scale, 1.0), -1.0)
    if abs(r) > 1 - 1e-12:
        return Estimate(r, r, r, n)
    z, half = math.atanh(r), 1.959964 / math.sqrt(n - 3)
    return Estimate(r, math.tanh(z - half), math.tanh(z + half), n)
