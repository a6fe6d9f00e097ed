"""The whole numbers behind quantized weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distill.quantization.layers import QuantizedLayer


class IntegerWeight(NamedTuple):
    """A weight as ``(codes - zero_point) * scale``.

    Attributes:
        codes: Whole numbers, int16, shape ``(channels, groups, weights)``; in symmetric levels from ``-highest``.
        scale: Steps, float32, shape ``(channels, groups, 1)``.
        zero_point: 0, or -0.5 where the levels lie half a step beside 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: float

    def symmetric(self) -> IntegerWeight:
        """The same weight with the zero point 0: levels between whole steps become odd numbers of half steps."""
        if self.zero_point == 0:
            return self
        codes = (2 * (self.codes.float() - self.zero_point)).round().short()
        return IntegerWeight(codes, self.scale / 2, 0.0)


def integer_weight(layer: QuantizedLayer) -> IntegerWeight:
    """Codes and steps of the weight that ``layer`` computes with; one row of codes per output channel.

    Raises:
        ValueError: If the layer's weight is kept in floating point (16 or 32 bits).

    Example:
        >>> from torch import nn
        >>> from lightning_distill.quantization import QuantSpec, prepare
        >>> layer = prepare(nn.Sequential(nn.Linear(4, 2)), QuantSpec(weights=2))[0]
        >>> sorted(set(integer_weight(layer).symmetric().codes.flatten().tolist())) <= [-3, -1, 1, 3]
        True
    """
    if layer.weight_bits > 8:
        raise ValueError(f"A weight of {layer.weight_bits} bits is kept in floating point and has no codes.")
    scale, channels = layer.effective_scale(), layer.weight.shape[0]
    with torch.no_grad():
        levels = layer.quantized_weight().detach().float().reshape(*scale.shape[:2], -1) / scale
    zero = layer.weight_grid.zero_point
    codes = (levels + zero).round().short()
    if len(scale) != channels:  # one step for all: every channel gets it
        codes, scale = codes.reshape(channels, 1, -1), scale.expand(channels, 1, 1)
    return IntegerWeight(codes, scale.float().contiguous(), zero)
