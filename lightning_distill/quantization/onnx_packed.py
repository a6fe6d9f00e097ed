"""Linear layers of packed weights: ``MatMulNBits`` of ONNX Runtime."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.quantization.integers import IntegerWeight
from lightning_distill.quantization.onnx_operators import operator
from lightning_distill.quantization.quantized_layer import QuantizedLayer

WIDTHS = (2, 4, 8)
"""Bits that the operator has."""


class PackedLinear(nn.Module):
    """The product with a layer's weight, without its bias: one operator for each width that its channels are kept in.

    Args:
        layer: A quantized linear layer.
        weight: Its whole numbers.
        block: Weights that share a step in the file; see :func:`block_size`.
        accuracy_level: Of the operator.
    """

    def __init__(self, layer: QuantizedLayer, weight: IntegerWeight, *, block: int, accuracy_level: int) -> None:
        super().__init__()
        by_width: dict[int, list[Tensor]] = {}
        for bits, rows in layer.rows_of_bits():
            every = torch.arange(len(weight.codes)) if isinstance(layer.bits, int) else rows
            by_width.setdefault(next(width for width in WIDTHS if width >= bits), []).append(every)
        chosen = {width: torch.cat(rows) for width, rows in by_width.items()}
        self.parts = nn.ModuleList(
            _PackedRows(_rows_of(weight, rows), width, block, accuracy_level) for width, rows in chosen.items()
        )
        self.register_buffer("places", torch.cat(list(chosen.values())).argsort())

    places: Tensor

    def forward(self, values: Tensor) -> Tensor:
        """``values @ weight.T``."""
        if len(self.parts) == 1:
            only: Tensor = self.parts[0](values)
            return only
        return torch.cat([part(values) for part in self.parts], dim=-1).index_select(-1, self.places)


def block_size(weight: IntegerWeight) -> int | None:
    """Weights that share a step in the file; ``None`` where the operator has no such blocks."""
    inputs = weight.codes[0].numel()
    if weight.codes.shape[1] == 1:  # one step per channel: repeated for each block
        return min(128, max(16, 1 << (inputs - 1).bit_length()))
    size = weight.codes.shape[2]
    return size if size >= 16 and size & (size - 1) == 0 else None


class _PackedRows(nn.Module):
    """Channels that are kept in one width: blocks of unsigned numbers, the first one in the lowest bits."""

    weight_codes: Tensor
    weight_scale: Tensor
    shift: Tensor | None

    def __init__(self, weight: IntegerWeight, width: int, block: int, accuracy_level: int) -> None:
        super().__init__()
        channels, inputs = len(weight.codes), weight.codes[0].numel()
        blocks = -(-inputs // block)
        codes = F.pad(weight.codes.reshape(channels, inputs).int() + 2 ** (width - 1), (0, blocks * block - inputs))
        parts = codes.reshape(channels, blocks, -1, 8 // width) << (width * torch.arange(8 // width))
        self.register_buffer("weight_codes", parts.sum(dim=-1).to(torch.uint8))
        scale = weight.scale.reshape(channels, -1)
        self.register_buffer("weight_scale", scale.expand(channels, blocks).contiguous())
        shift = -weight.zero_point * weight.scale  # what a code of 0 stands for, where levels lie beside it
        self.register_buffer("shift", shift.reshape(channels, -1).T.contiguous() if bool(shift.any()) else None)
        self.attributes = {
            "K": inputs, "N": channels, "bits": width, "block_size": block, "accuracy_level": accuracy_level
        }  # fmt: skip

    def forward(self, values: Tensor) -> Tensor:
        operands = (values, self.weight_codes, self.weight_scale)
        shape = (*values.shape[:-1], len(self.weight_codes))
        output = operator("com.microsoft::MatMulNBits", operands, torch.float32, shape, 1, **self.attributes)
        if self.shift is None:
            return output
        groups = values.reshape(*values.shape[:-1], self.shift.shape[0], -1).sum(dim=-1)
        return output + groups @ self.shift


def _rows_of(weight: IntegerWeight, rows: Tensor) -> IntegerWeight:
    zero = weight.zero_point[rows] if isinstance(weight.zero_point, Tensor) else weight.zero_point
    return IntegerWeight(weight.codes[rows], weight.scale[rows], zero)
