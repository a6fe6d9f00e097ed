"""What one operation of PyTorch computes, as the kernels of runtimes tell operations apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distill.hardware.alignment import align_channels

BLOCK = 16
"""Channels that vector units compute together."""
Kind = Literal["vector", "matrix", "attention", "convolution", "norm", "activation", "arithmetic", "function", "view"]
PRODUCTS = ("vector", "matrix", "convolution")
_NOTHING = ("empty", "empty_like", "empty_strided")  # memory only
_ARITHMETIC = ("add", "sub", "mul", "div", "rsub")
_UNROLLED = 20480  # numbers in one image above which PyTorch leaves its own convolution for oneDNN's


@dataclass(frozen=True)
class Convolution:
    """The shape of a convolution, as far as kernels differ by it.

    Attributes:
        dimensions: 1, 2 or 3.
        groups: Of channels.
        inputs: Channels that each group reads.
        outputs: Channels that each group writes.
        row: Outputs beside each other, the last dimension.
        columns: Numbers of the inputs when every position has its own copy of them, as a product of matrices reads
            them; 0 where the input is such a matrix itself.
        strided: Whether positions are left out.
        blocked: Whether PyTorch computes it in blocks of channels, by oneDNN, instead of unrolled into columns.
    """

    dimensions: int
    groups: int
    inputs: int
    outputs: int
    row: int
    columns: int
    strided: bool
    blocked: bool

    @property
    def depthwise(self) -> bool:
        """Whether each channel has a group of its own."""
        return self.groups > 1 and self.inputs == 1

    @property
    def padding(self) -> float:
        """Operations with the channels in whole blocks over those without; a few input channels stay as they are."""
        if self.depthwise:
            channels = self.groups * self.outputs
            return align_channels(channels, BLOCK, mode="ceil") / channels
        inputs = self.inputs if self.inputs <= 4 else align_channels(self.inputs, BLOCK, mode="ceil")
        return align_channels(self.outputs, BLOCK, mode="ceil") * inputs / (self.outputs * self.inputs)


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        kind: ``"vector"`` and ``"matrix"`` are products with one row and with more, ``"norm"`` is batch normalization,
            ``"activation"`` a ReLU, ``"arithmetic"`` a sum or product of numbers, ``"view"`` another shape of what is
            there, ``"function"`` everything else.
        flops: Multiplications and additions of products, two per MAC.
        parameters: Numbers of parameters and buffers that are read.
        activation_bytes: Read and written of everything else.
        convolution: The shape, of convolutions.
    """

    kind: Kind
    flops: int = 0
    parameters: int = 0
    activation_bytes: float = 0.0
    convolution: Convolution | None = None


def kind_of(func: Any, args: tuple[Any, ...]) -> Kind | None:
    """What ``func(*args)`` of PyTorch is; ``None`` if it computes nothing."""
    name = func.overloadpacket.__name__.rstrip("_")
    if name in _NOTHING:
        return None
    if "convolution" in name:
        return "convolution"
    if name in ("addmm", "mm"):
        rows = args[1 if name == "addmm" else 0].shape[-2]
        return "vector" if rows == 1 else "matrix"
    if name in ("bmm", "baddbmm"):
        return "matrix"
    if "attention" in name:
        return "attention"
    if "batch_norm" in name:
        return "norm"
    if name in ("relu", "hardtanh"):
        return "activation"
    return "arithmetic" if name in _ARITHMETIC else "function"


def convolution_of(args: tuple[Any, ...], output: Tensor) -> Convolution:
    """The shape of ``aten::convolution(*args)``."""
    image, weight, _, stride, _, dilation, transposed, _, groups = args[:9]
    kernel = tuple(weight.shape[2:])
    pointwise, strided = max(kernel) == 1, max(stride) > 1
    positions = output.shape[0] * math.prod(output.shape[2:])
    # the choice of PyTorch 2: its own kernel for one small image, and for few images with kernels of 1
    large = image.shape[0] > 1 or groups > 1 or min((1, *kernel)[-2:]) > 3 or image.numel() > _UNROLLED
    worthwhile = strided or max(dilation) > 1 or image.shape[0] >= BLOCK or not pointwise or torch.get_num_threads() > 1
    return Convolution(
        dimensions=len(kernel),
        groups=groups,
        inputs=weight.shape[0] // groups if transposed else weight.shape[1],
        outputs=weight.shape[1] if transposed else weight.shape[0] // groups,
        row=output.shape[-1],
        columns=0 if pointwise and not strided else positions * groups * math.prod(weight.shape[1:]),
        strided=strided,
        blocked=large and worthwhile,
    )


class Readers:
    """Follows the outputs of products through normalization, ReLU and views to the layers that read them.

    Args:
        quantizing: Names of the layers that quantize what they read.
    """

    def __init__(self, quantizing: frozenset[str]) -> None:
        self._quantizing = quantizing
        self._made: dict[int, tuple[Tensor, str]] = {}  # tensors are kept, so that no other gets the place
        self._whole: set[str] = set()
        self._floating: set[str] = set()

    def see(self, layer: str, kind: Kind | None, read: list[Tensor], written: list[Tensor], *, view: bool) -> None:
        """Note an operation of ``layer``."""
        sources = {self._made[id(tensor)][1] for tensor in read if id(tensor) in self._made}
        passes = view or kind in ("norm", "activation")
        if not passes and kind is not None:
            (self._whole if kind in PRODUCTS and layer in self._quantizing else self._floating).update(sources)
        if passes and len(sources) == 1:
            self._note(written, sources.pop())
        elif kind in PRODUCTS and layer in self._quantizing:
            self._note(written, layer)

    def end(self, outputs: list[Tensor]) -> set[str]:
        """Layers whose outputs nothing reads but what quantizes them; ``outputs`` are those of the network."""
        self._floating.update(self._made[id(tensor)][1] for tensor in outputs if id(tensor) in self._made)
        self._made.clear()
        return self._whole - self._floating

    def _note(self, written: list[Tensor], layer: str) -> None:
        for tensor in written:
            self._made[id(tensor)] = (tensor, layer)
