"""The layers that compute with fake-quantized weights and inputs."""

from __future__ import annotations

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
    for kind in (QuantizedLinear, QuantizedConv1d, QuantizedConv2d, QuantizedConv3d, QuantizedEmbedding)
}
"""Which layers can be quantized, and what they become. Subclasses compute something else and are left alone."""
