"""Networks of one bit, and of three values, whose levels follow from the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import wide


def binary_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Two levels :math:`\alpha \, \mathrm{sign}(w)`; the mean magnitude :math:`\alpha` is the best in squared error.

    XNOR-Net (Rastegari et al. 2016, section 3.1), https://arxiv.org/abs/1603.05279. The sign of 0 is 1. The gradient
    passes where ``|w| <= 1``.

    Args:
        weight: Shape ``(..., n)``; numbers along the last dimension share an ``alpha``.

    Returns:
        Quantized weights, in the shape of ``weight``, and ``alpha``, shape ``(..., 1)``.

    Example:
        >>> binary_quantize(torch.tensor([-1.0, 0.5]))
        (tensor([-0.7500,  0.7500]), tensor([0.7500]))
    """
    values = wide(weight)
    alpha = values.detach().abs().mean(dim=-1, keepdim=True)
    return _straight_through(weight, torch.where(values.detach() >= 0, alpha, -alpha)), alpha


def ternary_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Three levels, :math:`-\alpha, 0, \alpha`: 0 below a threshold of 0.7 times the mean magnitude.

    Ternary weight networks (Li et al. 2016, section 2.2), https://arxiv.org/abs/1605.04711; :math:`\alpha` is the mean
    magnitude above the threshold. The gradient passes where ``|w| <= 1``.

    Args:
        weight: Shape ``(..., n)``; numbers along the last dimension share an ``alpha``.

    Returns:
        Quantized weights, in the shape of ``weight``, and ``alpha``, shape ``(..., 1)``.

    Example:
        >>> ternary_quantize(torch.tensor([-1.0, 0.1, 0.5]))
        (tensor([-0.7500,  0.0000,  0.7500]), tensor([0.7500]))
    """
    values = wide(weight).detach()
    size = values.abs()
    large = size > 0.7 * size.mean(dim=-1, keepdim=True)
    alpha = (size * large).sum(dim=-1, keepdim=True) / large.sum(dim=-1, keepdim=True).clamp_min(1)
    return _straight_through(weight, values.sign() * large * alpha), alpha


def _straight_through(weight: Tensor, quantized: Tensor) -> Tensor:
    """``quantized``, with the gradient of ``weight`` clipped to [-1, 1]."""
    passed = weight.clamp(-1, 1)
    return passed + (quantized.to(weight.dtype) - passed).detach()
