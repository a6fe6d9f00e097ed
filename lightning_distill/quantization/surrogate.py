"""Gradients through rounding that are learned instead of passed straight through."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import wide
from lightning_distill.quantization.fake_quantize import Grid, RowGrid, fake_quantize


def soft_staircase(
    values: Tensor, scale: Tensor | float, sharpness: Tensor | float, *, lower: Tensor | float = 0.0
) -> Tensor:
    r"""Rounding as a smooth staircase of ``tanh`` pieces: differentiable soft quantization.

    .. math:: \phi(x) = \frac{\tanh(k (x - m_i))}{\tanh(k \Delta / 2)}, \qquad
        Q(x) = l + \Delta \left( i + \frac{\phi(x) + 1}{2} \right)

    in the bin ``i`` of middle ``m_i`` and width ``Delta``: Gong et al. (2019), section 3.1,
    https://arxiv.org/abs/1908.05033. The mean of its slope over a bin is 1; towards ``k = 0`` it is the identity,
    whose gradient is the straight-through one.

    Args:
        values: Any shape.
        scale: Width of a bin, positive; broadcastable to ``values``.
        sharpness: ``k``, in units of one over that of ``values``; positive.
        lower: A level: the bins lie between the levels.

    Returns:
        Shape of ``values``; gradients flow to ``values``, ``scale`` and ``sharpness``.

    Example:
        >>> soft_staircase(torch.tensor([0.05, 0.125, 0.2]), 0.25, 10.0)
        tensor([0.0314, 0.1250, 0.2186])
    """
    values = wide(values)
    steps = (values - lower) / scale
    whole = steps.detach().floor()
    k = torch.as_tensor(sharpness * scale, dtype=values.dtype, device=values.device)
    phi = torch.tanh(k * (steps - whole - 0.5)) / torch.tanh(k / 2)
    return lower + scale * (whole + (phi + 1) / 2)


def dsq_fake_quantize(values: Tensor, scale: Tensor, sharpness: Tensor, *, grid: Grid | RowGrid) -> Tensor:
    """:func:`~lightning_distill.quantization.fake_quantize` forward, the gradients of :func:`soft_staircase` backward.

    Args:
        values: Any shape.
        scale: Step, positive; broadcastable to ``values``.
        sharpness: ``k`` in units of one over the step, positive.
        grid: The levels.

    Returns:
        Shape and dtype of ``values``; outside the levels the gradient to ``values`` is 0.
    """
    hard = fake_quantize(values.detach(), scale.detach(), grid=grid)
    lowest, highest = ((code - grid.zero_point) * scale for code in (grid.lowest, grid.highest))
    clipped = torch.minimum(torch.maximum(wide(values), lowest), highest)
    soft = soft_staircase(clipped, scale, sharpness / scale.detach(), lower=-grid.zero_point * scale)
    return hard + (soft - soft.detach()).to(hard.dtype)
