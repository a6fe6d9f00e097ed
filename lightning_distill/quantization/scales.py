"""Step sizes from the numbers that are to be quantized."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import wide
from lightning_distill.quantization.fake_quantize import SMALLEST_SCALE, Grid, RowGrid, codes_of, grid_of

_FRACTIONS = 24


def minmax_scale(values: Tensor, grid: Grid | RowGrid) -> Tensor:
    """The step at which the largest magnitude along the last dimension is the outermost level; shape ``(..., 1)``.

    Example:
        >>> minmax_scale(torch.tensor([-1.3, 0.2, 1.4]), grid_of(4))
        tensor([0.2000])
    """
    return (wide(values).abs().amax(dim=-1, keepdim=True) / grid.largest).clamp_min(SMALLEST_SCALE)


def lsq_initial_scale(values: Tensor, grid: Grid) -> Tensor:
    """Where LSQ starts: twice the mean magnitude over the root of the highest code; shape ``(..., 1)``.

    Esser et al. (2020), section 2.1, https://arxiv.org/abs/1902.08153.
    """
    highest = math.sqrt(max(grid.highest, 1))
    return (2 * wide(values).abs().mean(dim=-1, keepdim=True) / highest).clamp_min(SMALLEST_SCALE)


def alternate_scale_and_codes(
    values: Tensor, scale: Tensor, grid: Grid | RowGrid, *, rounds: int = 4
) -> tuple[Tensor, list[Tensor]]:
    r"""Lower the squared error of quantization by turns: the best codes for the step, the best step for the codes.

    .. math:: c = \mathrm{round}(w / s), \qquad s = \langle w, c \rangle / \langle c, c \rangle

    Both halves are exact, so the error never grows; this is where alternation keeps its promise (Tseng 2001).

    Args:
        values: Shape ``(..., n)``; numbers along the last dimension share a step.
        scale: First step, shape ``(..., 1)``.
        grid: The levels.
        rounds: Rounds of two halves; 0 or more.

    Returns:
        The step, and the mean squared error of each row, shape ``(...)``, after each half.

    Example:
        >>> values = torch.tensor([0.9, 2.1])
        >>> scale, errors = alternate_scale_and_codes(values, torch.tensor([1.5]), grid_of(3), rounds=1)
        >>> scale, [round(float(error), 3) for error in errors]
        (tensor([1.5000]), [0.36, 0.36])
    """
    values = wide(values)
    errors = []
    for _ in range(rounds):
        levels = codes_of(values, scale, grid) - grid.zero_point
        errors.append((values - levels * scale).square().mean(dim=-1))
        power = levels.square().sum(dim=-1, keepdim=True)
        best = (values * levels).sum(dim=-1, keepdim=True) / power.clamp_min(SMALLEST_SCALE)
        scale = torch.where(power > 0, best, scale).clamp_min(SMALLEST_SCALE)
        errors.append((values - levels * scale).square().mean(dim=-1))
    return scale, errors


def mse_scale(values: Tensor, grid: Grid | RowGrid) -> Tensor:
    """The step with (nearly) the least squared error: clipping the largest values pays where levels are few.

    24 clips between none and nearly all are tried for each row, and the best one is polished by
    :func:`alternate_scale_and_codes`.

    Args:
        values: Shape ``(..., n)``; numbers along the last dimension share a step.
        grid: The levels.

    Returns:
        Shape ``(..., 1)``.

    Example:
        >>> mse_scale(torch.tensor([-1.0, 1.0, 0.98, -0.97, 0.0]), grid_of(2))
        tensor([0.9875])
    """
    values = wide(values).detach()
    largest = minmax_scale(values, grid)
    best, least = largest, torch.full_like(largest, math.inf)
    for part in range(_FRACTIONS, 0, -1):
        scale = largest * (part / _FRACTIONS)
        error = (values - (codes_of(values, scale, grid) - grid.zero_point) * scale).square().mean(dim=-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return alternate_scale_and_codes(values, best, grid)[0]


def affine_scale(low: Tensor | float, high: Tensor | float, bits: int) -> tuple[Tensor, Tensor]:
    """Step and zero point of unsigned codes for values from ``low`` to ``high``; 0 is always a level.

    Args:
        low: Smallest value; taken as 0 where it is above.
        high: Largest value; taken as 0 where it is below.
        bits: Of the codes.

    Returns:
        The step and the code of 0, a whole number in floating point.

    Example:
        >>> affine_scale(-1.3, 1.9, 4)
        (tensor(0.2133), tensor(6.))
    """
    grid = grid_of(bits, "unsigned")
    low, high = torch.as_tensor(low).clamp_max(0), torch.as_tensor(high).clamp_min(0)
    scale = ((high - low) / grid.highest).clamp_min(SMALLEST_SCALE)
    return scale, (-low / scale).round().clamp(grid.lowest, grid.highest)


def mse_affine_scale(
    values: Tensor, bits: int, *, low: float | None = None, high: float | None = None
) -> tuple[Tensor, Tensor]:
    """Step and zero point with nearly the least squared error, of one range for all ``values``.

    Args:
        values: A sample of what will be quantized, any shape.
        bits: Of the codes.
        low: Smallest value that was ever seen, where ``values`` are only a part of all.
        high: The largest.

    Returns:
        As :func:`affine_scale`.
    """
    values = wide(values).detach().flatten()
    low = float(values.min()) if low is None else low
    high = float(values.max()) if high is None else high
    grid = grid_of(bits, "unsigned")
    best, least = affine_scale(low, high, bits), math.inf
    for part in range(_FRACTIONS, 0, -1):
        scale, zero = affine_scale(low * part / _FRACTIONS, high * part / _FRACTIONS, bits)
        scale, zero = scale.to(values), zero.to(values)
        error = float((values - (codes_of(values, scale, grid, zero) - zero) * scale).square().mean())
        if error < least:
            best, least = (scale, zero), error
    return best
