"""The whole numbers behind quantized weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_distill.quantization.fake_quantize import codes_of, grid_of
from lightning_distill.quantization.layers import QuantizedLinear
from lightning_distill.quantization.quantized_layer import QuantizedLayer, output_channels


class IntegerWeight(NamedTuple):
    """A weight as ``(codes - zero_point) * scale``.

    Attributes:
        codes: Whole numbers, int16, shape ``(channels, groups, weights)``; in symmetric levels from ``-highest``.
        scale: Steps, float32, shape ``(channels, groups, 1)``.
        zero_point: 0, or -0.5 where the levels lie half a step beside 0; where channels differ, shape
            ``(channels, 1, 1)``.
    """

    codes: Tensor
    scale: Tensor
    zero_point: float | Tensor

    def symmetric(self) -> IntegerWeight:
        """The same weight with the zero point 0: levels between whole steps become odd numbers of half steps."""
        zero = torch.as_tensor(self.zero_point, device=self.codes.device)
        factor = torch.where(zero == 0, 1, 2)
        codes = (factor * (self.codes.float() - zero)).round().short()
        return IntegerWeight(codes, self.scale / factor, 0.0)


def integer_weight(layer: QuantizedLayer) -> IntegerWeight:
    """Codes and steps of the weight that ``layer`` computes with; one row of codes per output channel.

    Raises:
        ValueError: If the layer's weight is kept in floating point (16 or 32 bits).

    Example:
        >>> from torch import nn
        >>> from lightning_distill.quantization import QuantSpec, prepare
        >>> layer = prepare(nn.Sequential(nn.Linear(4, 2)), QuantSpec(weights=2))[0]
        >>> set(integer_weight(layer).symmetric().codes.flatten().tolist()) <= {-3, -1, 1, 3}
        True
    """
    if layer.weight_bits > 8:
        raise ValueError(f"A weight of {layer.weight_bits} bits is kept in floating point and has no codes.")
    scale, channels = layer.effective_scale(), output_channels(layer)
    groups = scale.shape[1]
    scale = scale.expand(channels, groups, 1)  # one step for all: every channel gets it
    with torch.no_grad():
        weight = layer.channels_first(layer.quantized_weight().detach().float())
        levels = weight.reshape(channels, groups, -1) / scale
    zero = layer.weight_grid.zero_point
    codes = (levels + zero).round().short()
    return IntegerWeight(codes, scale.float().contiguous(), zero)


def integer_linear(layer: QuantizedLinear, values: Tensor) -> Tensor:
    r"""What a quantized linear layer computes, in whole numbers: a reference for kernels.

    .. math:: y_c = s_x s_{w,c} \Big( \sum_i q_{x,i} q_{w,c,i} - z_x \sum_i q_{w,c,i} \Big) + b_c

    Codes of 8 bits are multiplied and summed as int32 (exact up to 2 ** 15 inputs), as integer kernels do; steps and
    zero point come in once, at the end (Jacob et al. 2018, section 2.2, https://arxiv.org/abs/1712.05877).

    Args:
        layer: With weights and inputs of at most 8 bits, one step per output channel or one for all.
        values: Shape ``(..., in_features)``.

    Returns:
        Shape ``(..., out_features)``, float32.

    Raises:
        ValueError: If weights or inputs stay in floating point, or groups of weights have steps of their own.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.quantization import QuantSpec, calibrate, prepare
        >>> network, x = nn.Sequential(nn.Linear(4, 2)), torch.randn(5, 4)
        >>> layer = prepare(network, QuantSpec(weights=8, activations=8))[0]
        >>> calibrate(network, [x])
        >>> torch.allclose(integer_linear(layer, x), layer(x), atol=1e-5)
        True
    """
    if layer.activation_bits is None:
        raise ValueError("The layer's inputs stay in floating point: prepare it with `activations` of 2 to 8 bits.")
    weight = integer_weight(layer).symmetric()
    if weight.codes.shape[1] != 1:
        raise ValueError("The layer's weights have a step per group; an integer sum needs one per output channel.")
    scale, zero = (level.detach().float() for level in layer.input_levels(values))
    inputs = codes_of(values.detach().float(), scale, grid_of(layer.activation_bits, "unsigned"), zero).int()
    codes = weight.codes.squeeze(1).int()
    products = (inputs.unsqueeze(-2) * codes).sum(dim=-1, dtype=torch.int32)
    whole = products - zero.round().int() * codes.sum(dim=-1, dtype=torch.int32)
    result = whole.float() * (scale * weight.scale.flatten())
    return result if layer.bias is None else result + layer.bias.detach().float()
