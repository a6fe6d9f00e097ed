"""Quantized layers as ONNX operators: whole numbers in the file, and the steps that training has found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.quantization.fake_quantize import grid_of
from lightning_distill.quantization.integers import integer_weight
from lightning_distill.quantization.layers import transposed_convolution, transposed_from_rows
from lightning_distill.quantization.onnx_operators import operator
from lightning_distill.quantization.onnx_packed import PackedLinear, block_size
from lightning_distill.quantization.quantized_layer import STEPS, QuantizedLayer


class OnnxLayer(nn.Module):
    """What a quantized layer becomes while it is exported: it runs in ONNX only."""

    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias_codes: Tensor
    bias_scale: Tensor
    bias_zero_point: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    highest_code: int
    packed: PackedLinear | None
    weight_shape: tuple[int, ...]
    rows_shape: tuple[int, ...]

    def dequantized_input(self, values: Tensor) -> Tensor:
        """``values`` rounded to the levels of the layer's input, as a pair of operators that runtimes know."""
        if not hasattr(self, "input_scale"):
            return values
        inputs = (values, self.input_scale, self.input_zero_point)
        codes = operator("QuantizeLinear", inputs, torch.uint8, values.shape)
        if self.highest_code < 255:  # fewer bits than their container: behind the operator, so that it stays fusable
            codes = codes.clamp(max=self.highest_code)
        return operator("DequantizeLinear", (codes, *inputs[1:]), torch.float32, values.shape)

    def dequantized_weight(self, shape: tuple[int, ...], axis: int) -> Tensor:
        """The weight in floating point; ``axis`` is that of the channels in ``weight_codes``."""
        attributes = {"axis": axis}
        if self.weight_scale.ndim > 1:
            attributes = {"axis": 1, "block_size": self.weight_codes.shape[1] // self.weight_scale.shape[1]}
        inputs: tuple[Tensor, ...] = (self.weight_codes, self.weight_scale)
        if hasattr(self, "weight_zero_point"):
            inputs = (*inputs, self.weight_zero_point)
        weight = operator("DequantizeLinear", inputs, torch.float32, self.weight_codes.shape, **attributes)
        return weight.reshape(shape)


class OnnxLinear(OnnxLayer, nn.Linear):
    """A linear layer, of whole numbers on both sides or of packed weights."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Linear``."""
        values = self.dequantized_input(input)
        if self.packed is not None:
            output: Tensor = self.packed(values)
        elif self.weight_scale.ndim > 1:
            output = values @ self.dequantized_weight((self.out_features, self.in_features), 0).T
        else:
            output = values @ self.dequantized_weight((self.in_features, self.out_features), 1)
        return output if self.bias is None else output + self.dequantized_bias()

    def dequantized_bias(self) -> Tensor:
        """The bias, of 32 bits in steps of the product where the layer computes with whole numbers."""
        if not hasattr(self, "bias_codes"):
            return self.bias
        inputs = (self.bias_codes, self.bias_scale, self.bias_zero_point)
        return operator("DequantizeLinear", inputs, torch.float32, self.bias_codes.shape, axis=0)


class OnnxConv1d(OnnxLayer, nn.Conv1d):
    """A convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv1d``."""
        weight = self.dequantized_weight(self.weight_shape, 0)
        output: Tensor = self._conv_forward(self.dequantized_input(input), weight, self.bias)
        return output


class OnnxConv2d(OnnxLayer, nn.Conv2d):
    """A convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv2d``."""
        weight = self.dequantized_weight(self.weight_shape, 0)
        output: Tensor = self._conv_forward(self.dequantized_input(input), weight, self.bias)
        return output


class OnnxConv3d(OnnxLayer, nn.Conv3d):
    """A convolution."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Conv3d``."""
        weight = self.dequantized_weight(self.weight_shape, 0)
        output: Tensor = self._conv_forward(self.dequantized_input(input), weight, self.bias)
        return output


class OnnxConvTranspose(OnnxLayer):
    """A transposed convolution; its codes are kept with the output channels first."""

    groups: int

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As ``nn.ConvTranspose1d`` to ``3d``."""
        rows = self.dequantized_weight(self.rows_shape, 0)
        weight = transposed_from_rows(rows, self.weight_shape, self.groups)
        return transposed_convolution(self, self.dequantized_input(input), weight, output_size)


class OnnxConvTranspose1d(OnnxConvTranspose, nn.ConvTranspose1d):
    """A transposed convolution."""


class OnnxConvTranspose2d(OnnxConvTranspose, nn.ConvTranspose2d):
    """A transposed convolution."""


class OnnxConvTranspose3d(OnnxConvTranspose, nn.ConvTranspose3d):
    """A transposed convolution."""


class OnnxEmbedding(OnnxLayer, nn.Embedding):
    """A table of whole numbers; only the rows that are read become floating point."""

    def forward(self, input: Tensor) -> Tensor:
        """As ``nn.Embedding``."""
        scale = self.weight_scale.reshape(len(self.weight_codes), -1)
        rows = self.weight_codes[input].float().reshape(*input.shape, scale.shape[1], -1)
        return (rows * scale[input].unsqueeze(-1)).reshape(*input.shape, self.embedding_dim)


_BECOMES: dict[type[nn.Module], type[OnnxLayer]] = {
    nn.Linear: OnnxLinear,
    nn.Conv1d: OnnxConv1d,
    nn.Conv2d: OnnxConv2d,
    nn.Conv3d: OnnxConv3d,
    nn.ConvTranspose1d: OnnxConvTranspose1d,
    nn.ConvTranspose2d: OnnxConvTranspose2d,
    nn.ConvTranspose3d: OnnxConvTranspose3d,
    nn.Embedding: OnnxEmbedding,
}


def to_onnx_layer(layer: QuantizedLayer, name: str, *, accuracy_level: int) -> None:
    """Turn ``layer`` into one of the above, in place.

    Raises:
        ValueError: If its levels do not fit into 8 bits.
    """
    if layer.weight_bits > 8:
        _to_plain_layer(layer)
        return
    found, bits = integer_weight(layer), layer.weight_bits
    # ranges of tokens are left to the runtime: `MatMulNBits` finds them as it rounds its inputs
    activations = layer.activation_bits if layer.needs_range else None
    packed = None
    if isinstance(layer, nn.Linear) and activations is None and (block := block_size(found)) is not None:
        packed = PackedLinear(layer, found, block=block, accuracy_level=accuracy_level)
    ours = next(ours for plain, ours in _BECOMES.items() if isinstance(layer, plain))
    exported: Any = layer
    exported.weight_shape = tuple(layer.weight.shape)
    if activations is not None:
        scale, zero = layer.activation_scale.detach().float(), layer.activation_zero_point.detach()
    exported.rows_shape = tuple(layer.channels_first(layer.weight).shape)
    _drop(exported, (*STEPS, "weight"))
    exported.__class__, exported.packed = ours, packed
    if packed is not None:
        return
    if activations is not None:
        exported.register_buffer("input_scale", scale)
        exported.register_buffer("input_zero_point", zero.to(torch.uint8))
        exported.highest_code = grid_of(activations, "unsigned").highest
    whole = found.symmetric()
    if int(whole.codes.abs().max()) > 127:
        raise ValueError(
            f"The layer {name!r} has {bits} bits with levels half a step beside 0, which no ONNX type of 8 bits holds. "
            "Use scheme='lsq', or fewer bits."
        )
    codes, steps = whole.codes.to(torch.int8), whole.scale.squeeze(-1)
    if activations is not None:  # integer kernels are only found where it is written out
        exported.register_buffer("weight_zero_point", torch.zeros(steps.squeeze(-1).shape, dtype=torch.int8))
    if isinstance(exported, (OnnxEmbedding, OnnxConvTranspose)) or steps.shape[1] > 1:
        exported.register_buffer("weight_codes", codes.flatten(1))
        exported.register_buffer("weight_scale", steps if steps.shape[1] > 1 else steps.flatten())
    elif isinstance(exported, OnnxLinear):
        exported.register_buffer("weight_codes", codes.flatten(1).T.contiguous())
        exported.register_buffer("weight_scale", steps.flatten())
        if activations is not None and exported.bias is not None:
            _quantize_bias(exported)
    else:
        exported.register_buffer("weight_codes", codes.reshape(exported.weight_shape))
        exported.register_buffer("weight_scale", steps.flatten())


def _to_plain_layer(layer: QuantizedLayer) -> None:
    """Make it the layer that it was before quantization; a weight of 16 bits is rounded to half precision."""
    if layer.needs_range:
        raise ValueError(
            "A layer with weights in floating point quantizes its input, which ONNX runtimes do not compute with: "
            "leave the layer out, `skip=[...]`, or give its weights at most 8 bits."
        )
    plain: Any = layer
    with torch.no_grad():
        plain.weight.copy_(layer.quantized_weight())
    _drop(plain, STEPS)
    plain.__class__ = next(kind for kind in _BECOMES if isinstance(layer, kind))


def _drop(layer: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if name in layer._parameters or name in layer._buffers:
            delattr(layer, name)


def _quantize_bias(layer: Any) -> None:
    """Give the bias the steps of the products that it is added to, where 32 bits hold it."""
    scale = layer.input_scale * layer.weight_scale
    codes = (layer.bias.detach().double() / scale.double()).round()
    if codes.abs().max() < 2**31:
        layer.register_buffer("bias_codes", codes.int())
        layer.register_buffer("bias_scale", scale)
        layer.register_buffer("bias_zero_point", torch.zeros_like(layer.bias_codes))
