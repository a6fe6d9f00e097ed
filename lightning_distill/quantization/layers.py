"""The layers that compute with fake-quantized weights and inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.quantization.fake_quantize import blend
from lightning_distill.quantization.quantized_layer import QuantizedLayer, unused


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """A linear layer; see :class:`QuantizedLayer`."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        return F.linear(self._input_in_force(input), self._weight_in_force(), self.bias)


class QuantizedConv1d(QuantizedLayer, nn.Conv1d):
    """A convolution; see :class:`QuantizedLayer`."""

    plain = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv1d``."""
        output: Tensor = self._conv_forward(self._input_in_force(input), self._weight_in_force(), self.bias)
        return output


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution; see :class:`QuantizedLayer`."""

    plain = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        output: Tensor = self._conv_forward(self._input_in_force(input), self._weight_in_force(), self.bias)
        return output


class QuantizedConv3d(QuantizedLayer, nn.Conv3d):
    """A convolution; see :class:`QuantizedLayer`."""

    plain = nn.Conv3d

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv3d``."""
        output: Tensor = self._conv_forward(self._input_in_force(input), self._weight_in_force(), self.bias)
        return output


class _Transposed(QuantizedLayer):
    """What transposed convolutions have in common: shape ``(inputs, output channels of a group, ...)``."""

    groups: int

    def channels_first(self, weight: Tensor) -> Tensor:
        """``weight`` in the shape ``(output channels, inputs of a group, ...)``."""
        return transposed_channels_first(weight, self.groups)

    def from_rows(self, rows: Tensor) -> Tensor:
        """What ``rows`` has made of a weight, in the layer's own shape again."""
        return transposed_from_rows(rows, self.weight.shape, self.groups)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As ``nn.ConvTranspose1d`` to ``3d``."""
        values, weight = self._input_in_force(input), self._weight_in_force()
        return transposed_convolution(self, values, weight, output_size)


class QuantizedConvTranspose1d(_Transposed, nn.ConvTranspose1d):
    """A transposed convolution; see :class:`QuantizedLayer`."""

    plain = nn.ConvTranspose1d


class QuantizedConvTranspose2d(_Transposed, nn.ConvTranspose2d):
    """A transposed convolution; see :class:`QuantizedLayer`."""

    plain = nn.ConvTranspose2d


class QuantizedConvTranspose3d(_Transposed, nn.ConvTranspose3d):
    """A transposed convolution; see :class:`QuantizedLayer`."""

    plain = nn.ConvTranspose3d


class QuantizedEmbedding(QuantizedLayer, nn.Embedding):
    """A table of vectors; see :class:`QuantizedLayer`. Only the rows that are read are quantized."""

    plain = nn.Embedding
    reads_numbers = False

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Embedding``."""
        if not self.enabled or self.spec.granularity == "tensor":
            table = self._weight_in_force()
            return F.embedding(
                input, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )
        vectors = nn.Embedding.forward(self, input)
        if self.alpha == 0:
            return unused(vectors, self._learned())
        rows = vectors.reshape(-1, *self.rows(self.weight[:1]).shape[1:])
        scale = self.weight_scale[numbers := input.reshape(-1)]
        return blend(vectors, self._quantized_rows(rows, scale, numbers).reshape(vectors.shape), self.alpha)


QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    kind.plain: kind
    for kind in (
        QuantizedLinear,
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedConvTranspose1d,
        QuantizedConvTranspose2d,
        QuantizedConvTranspose3d,
        QuantizedEmbedding,
    )
}
"""Which layers can be quantized, and what they become. Subclasses compute something else and are left alone."""


def transposed_convolution(layer: Any, values: Tensor, weight: Tensor, output_size: list[int] | None) -> Tensor:
    """What ``nn.ConvTranspose1d`` to ``3d`` compute, with another weight."""
    dimensions = weight.ndim - 2
    added = layer._output_padding(
        values, output_size, layer.stride, layer.padding, layer.kernel_size, dimensions, layer.dilation
    )
    transpose: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
    output: Tensor = transpose(
        values, weight, layer.bias, layer.stride, layer.padding, added, layer.groups, layer.dilation
    )
    return output


def transposed_channels_first(weight: Tensor, groups: int) -> Tensor:
    """The weight of a transposed convolution with its output channels first: ``(channels, inputs of a group, ...)``."""
    return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)


def transposed_from_rows(rows: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """The weight, of ``shape``, of which :func:`transposed_channels_first` has made ``rows``."""
    inputs, channels, *kernel = shape
    return rows.reshape(groups, channels, inputs // groups, *kernel).transpose(1, 2).reshape(*shape)
