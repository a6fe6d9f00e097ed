"""How large a quantized network is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_distill.quantization.network import quantized_layers
from lightning_distill.quantization.quantized_layer import STEPS

_SCALE_BYTES = 4


@dataclass(frozen=True)
class LayerSize:
    """The weights of one quantized layer.

    Attributes:
        name: Of the layer.
        shape: Of its weight.
        bits: Of one weight; in the mean, where channels differ.
        activation_bits: Of its input; ``None`` where it stays in floating point.
        bytes: Of weights, packed, their steps, and where channels differ a byte for each channel's bits.
    """

    name: str
    shape: tuple[int, ...]
    bits: float
    activation_bits: int | None
    bytes: int


@dataclass(frozen=True)
class SizeReport:
    """Size of a network.

    Attributes:
        layers: One row for each quantized layer.
        average_bits: Bits per weight of the quantized layers, without their steps.
        bytes: Of everything: packed weights, their steps (4 bytes each), and the rest as it is.
        float32_bytes: Of the same network in float32 without quantization.
    """

    layers: tuple[LayerSize, ...]
    average_bits: float
    bytes: int
    float32_bytes: int

    @property
    def ratio(self) -> float:
        """Share of the float32 size."""
        return self.bytes / self.float32_bytes

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = []
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            rows.append(f"{layer.name:{width}}  {shape:>12}  {f'{layer.bits:.3g}':>4} bits  {layer.bytes:>10,} bytes")
        total = (
            f"{self.average_bits:.2f} bits per weight, {self.bytes:,} bytes, {self.ratio:.3f} of float32 "
            f"({self.float32_bytes:,})"
        )
        return "\n".join([*rows, total])


def size_report(model: nn.Module) -> SizeReport:
    """Bits and bytes of a network that :func:`~lightning_distill.quantization.prepare` has quantized.

    Raises:
        ValueError: If it has no quantized layer.

    Example:
        >>> from lightning_distill.quantization import QuantSpec, prepare
        >>> print(size_report(prepare(nn.Sequential(nn.Linear(64, 8)), QuantSpec(4))))
        0          8x64     4 bits         288 bytes
        4.00 bits per weight, 320 bytes, 0.154 of float32 (2,080)
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("`model` has no quantized layer; call `prepare(model, spec)` first.")
    rows = []
    for name, layer in layers.items():
        per_row = layer.weight.numel() // len(layer.log_weight_scale)
        size = sum(-(-len(rows) * per_row * bits // 8) for bits, rows in layer.rows_of_bits())
        if layer.weight_bits <= 8:
            size += layer.log_weight_scale.numel() * _SCALE_BYTES
        if not isinstance(layer.bits, int):
            size += len(layer.bits)
        rows.append(LayerSize(name, tuple(layer.weight.shape), layer.mean_weight_bits, layer.activation_bits, size))
    ours = {id(layer.weight) for layer in layers.values()}
    helpers = {
        id(tensor)
        for layer in layers.values()
        for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
        if name in STEPS
    }
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in ours | helpers]
    weights = sum(layer.weight.numel() for layer in layers.values())
    bits = sum(layer.weight.numel() * layer.mean_weight_bits for layer in layers.values())
    inputs = sum(_SCALE_BYTES + 1 for layer in layers.values() if layer.needs_range)
    return SizeReport(
        layers=tuple(rows),
        average_bits=bits / weights,
        bytes=sum(row.bytes for row in rows) + sum(t.numel() * t.element_size() for t in rest) + inputs,
        float32_bytes=4 * (weights + sum(t.numel() for t in rest)),
    )
