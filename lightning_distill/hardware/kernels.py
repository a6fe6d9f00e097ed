"""The kernels that runtimes compute operations with, and how long those take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lightning_distill.hardware.operations import PRODUCTS, Convolution, Operation

if TYPE_CHECKING:
    from lightning_distill.hardware.counting import LayerCost

Runtime = Literal["torch", "onnx"]
RUNTIMES: tuple[str, ...] = get_args(Runtime)
_MATRIX_BITS = (2, 4, 8)  # of weights alone that MatMulNBits has
_CONVOLUTION_BITS = (4, 8)  # of weights alone that files hold
_FLOAT_BYTES = 4
_TORCH = {"norm": "function", "arithmetic": "activation"}
_ONNX = {"norm": "activation"}  # both become part of the layer before


@dataclass(frozen=True)
class Use:
    """How much one operation asks of a kernel.

    Attributes:
        kernel: Its name.
        copies: Pieces of the inputs that are copied one by one, to unroll them into columns.
        flops: Multiplications and additions, with what is computed for padding.
        activation_bytes: Read and written; of unrolled inputs, those of the columns.
        weight_bytes: As they are stored.
    """

    kernel: str
    copies: float = 0.0
    flops: float = 0.0
    activation_bytes: float = 0.0
    weight_bytes: float = 0.0

    @property
    def amounts(self) -> tuple[float, ...]:
        """One call, and the others, in the order of :attr:`Kernel.seconds`."""
        return (1.0, self.copies, self.flops, self.activation_bytes, self.weight_bytes)


@dataclass(frozen=True)
class Kernel:
    """Seconds of a kernel: a constant per call and per copy, and what operations and bytes take; all are added.

    Args:
        overhead: Seconds of a call, at least 0.
        copy: Seconds of each piece of the inputs that a convolution copies, at least 0.
        throughput: Operations per second, positive; infinity if arithmetic costs nothing.
        bandwidth: Bytes of inputs and outputs per second, positive or infinity.
        weight_bandwidth: Bytes of stored weights per second, positive or infinity.

    Raises:
        ValueError: If a number is outside its range.
    """

    overhead: float = 0.0
    copy: float = 0.0
    throughput: float = math.inf
    bandwidth: float = math.inf
    weight_bandwidth: float = math.inf

    def __post_init__(self) -> None:
        for name in ("overhead", "copy"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise ValueError(f"`{name}` must be finite and at least 0, got {value}.")
        for name in ("throughput", "bandwidth", "weight_bandwidth"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")

    @classmethod
    def of_seconds(cls, seconds: Sequence[float]) -> Kernel:
        """From the seconds of a call, a copy, an operation and a byte of each kind."""
        return cls(*seconds[:2], *(1 / value if value else math.inf for value in seconds[2:]))

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of a call, a copy, an operation, a byte of activations, and one of weights."""
        return (self.overhead, self.copy, 1 / self.throughput, 1 / self.bandwidth, 1 / self.weight_bandwidth)

    def latency(self, use: Use) -> float:
        """Seconds of one operation."""
        return math.fsum(each * amount for each, amount in zip(self.seconds, use.amounts, strict=True))

    def as_dict(self) -> dict[str, float]:
        """What is not free."""
        return {name: value for name, value in asdict(self).items() if value not in (0, math.inf)}


def kernel_use(operation: Operation, cost: LayerCost, runtime: Runtime) -> Use:
    """Which kernel of ``runtime`` computes an operation of a layer, and how much it has to do."""
    return _torch_use(operation, cost) if runtime == "torch" else _onnx_use(operation, cost)


def floating(kernel: str) -> str:
    """The kernel that computes the same in floating point."""
    return kernel.partition(",")[0]


def _torch_use(operation: Operation, cost: LayerCost) -> Use:
    """Eager mode computes in floating point; weights of few bits count as fewer bytes."""
    weights = operation.parameters * cost.weight_bits / 8
    shape = operation.convolution
    if shape is None:
        return _plain(operation, _TORCH.get(operation.kind, operation.kind), weights)
    if not shape.blocked:
        return _by_columns("convolution by columns", operation, shape, weights)
    return Use("convolution by blocks", 0, operation.flops * shape.padding, operation.activation_bytes, weights)


def _onnx_use(operation: Operation, cost: LayerCost) -> Use:
    """ONNX Runtime on the CPU, of files of :func:`~lightning_distill.quantization.export_onnx`."""
    arithmetic, stored = _arithmetic(operation, cost)
    weights = operation.parameters * stored / 8
    shape = operation.convolution
    if shape is None:
        return _plain(operation, _ONNX.get(operation.kind, operation.kind) + arithmetic, weights)
    kernel = ("depthwise convolution" if shape.depthwise else "convolution") + arithmetic
    if shape.dimensions == 2 and not arithmetic:
        blocks = f"{kernel} by blocks"
        return Use(blocks, 0, operation.flops * shape.padding, operation.activation_bytes, weights)
    return _by_columns(kernel, operation, shape, weights, integers=arithmetic == ", int8")


def _by_columns(
    kernel: str, operation: Operation, shape: Convolution, weights: float, *, integers: bool = False
) -> Use:
    """A product of matrices with inputs that are unrolled first, if they are not such a matrix themselves.

    Numbers come row by row, from inputs of which positions are left out one by one. Integers are stored with their
    channels beside each other, which are copied together.
    """
    if not shape.columns:
        return Use(kernel, 0, operation.flops, operation.activation_bytes, weights)
    piece = shape.inputs if integers else 1 if shape.strided else shape.row
    width = 1 if integers else _FLOAT_BYTES
    return Use(kernel, shape.columns / piece, operation.flops, 2.0 * width * shape.columns, weights)


def _plain(operation: Operation, kernel: str, weights: float) -> Use:
    if operation.kind in PRODUCTS:
        return Use(kernel, 0, operation.flops, operation.activation_bytes, weights)
    return Use(kernel, 0, operation.flops, operation.activation_bytes + weights)


def _arithmetic(operation: Operation, cost: LayerCost) -> tuple[str, int]:
    """What ONNX Runtime computes a quantized layer with, and the bits that a stored weight has there.

    With quantized inputs everything is 8 bits wide; a convolution also needs a reader that quantizes, or else computes
    in floating point with weights that are converted in each run. So it does with weights alone.
    """
    convolution = operation.kind == "convolution"
    if operation.kind not in PRODUCTS or cost.weight_bits > 8:
        return "", 8 * _FLOAT_BYTES
    if cost.activation_bits is not None:
        return (", int8" if cost.feeds_integers or not convolution else ", int8 to float"), 8
    stored = next(bits for bits in (_CONVOLUTION_BITS if convolution else _MATRIX_BITS) if bits >= cost.weight_bits)
    return f", {stored}-bit weights", stored
