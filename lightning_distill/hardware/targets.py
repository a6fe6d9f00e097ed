"""What some machines compute with: number formats, instructions, vectors, the first cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_distill.hardware.alignment import simd_width

Layout = Literal["contiguous", "channels_last"]


@dataclass(frozen=True)
class Arithmetic:
    """One way in which a machine multiplies and adds.

    Attributes:
        bits: Of both factors.
        integer: Whether they are whole numbers.
        accumulator: Bits of the sum.
        instruction: Its name.
        macs: Multiply-adds of one instruction (of one of a warp, on a GPU).
        multiple: Channels that fill its vectors or blocks: numbers of channels should be a multiple.
    """

    bits: int
    integer: bool
    accumulator: int
    instruction: str
    macs: int
    multiple: int

    def __str__(self) -> str:
        kind = "int" if self.integer else "float"
        return f"{kind}{self.bits} by {self.instruction}, {self.macs} multiply-adds each"


@dataclass(frozen=True)
class Target:
    """A machine that a network is meant for.

    Attributes:
        name: Of the machine.
        arithmetic: What it has; float32 is always there.
        l1_bytes: Of the first data cache, or of what takes its place.
        alignment: Bytes at whose multiples data should begin: one vector.
        layout: Order of a convolution's weights that its kernels like.
        granularities: Which weights may share a step in its integer kernels: each sums up a whole output channel before
            it is scaled, so that groups within a channel do not fit.
        source: Where the numbers are from.

    Raises:
        ValueError: If a number is not positive, or there is no arithmetic in float32.
    """

    name: str
    arithmetic: tuple[Arithmetic, ...]
    l1_bytes: int
    alignment: int
    layout: Layout = "channels_last"
    granularities: tuple[str, ...] = ("tensor", "channel")
    source: str = ""

    def __post_init__(self) -> None:
        for name, value in (("l1_bytes", self.l1_bytes), ("alignment", self.alignment)):
            if value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not any(one.bits == 32 and not one.integer for one in self.arithmetic):
            raise ValueError(f"`arithmetic` must have one with float32, got {[str(one) for one in self.arithmetic]}.")

    def computes(self, bits: int, *, integer: bool) -> Arithmetic | None:
        """The narrowest arithmetic that takes factors of ``bits`` bits; ``None`` if there is none."""
        fitting = [one for one in self.arithmetic if one.integer == integer and one.bits >= bits]
        return min(fitting, key=lambda one: one.bits, default=None)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "x86-avx512",
            (
                Arithmetic(8, True, 32, "VPDPBUSD", 64, simd_width("avx512", 8)),
                Arithmetic(32, False, 32, "VFMADD", 16, simd_width("avx512", 32)),
            ),
            l1_bytes=32 * 1024,
            alignment=64,
            source="Intel Intrinsics Guide (AVX512_VNNI, since Cascade Lake, whose L1D has 32 KiB; Ice Lake 48 KiB)",
        ),
        Target(
            "arm-neon",
            (
                Arithmetic(8, True, 16, "SMLAL", 8, simd_width("neon", 8)),
                Arithmetic(32, False, 32, "FMLA", 4, simd_width("neon", 32)),
            ),
            l1_bytes=32 * 1024,
            alignment=16,
            source="Arm Architecture Reference Manual, Armv8.0-A Advanced SIMD; 32 KiB are usual",
        ),
        Target(
            "cortex-a78",
            (
                Arithmetic(8, True, 32, "SDOT", 16, simd_width("neon", 8)),
                Arithmetic(16, False, 16, "FMLA", 8, simd_width("neon", 16)),
                Arithmetic(32, False, 32, "FMLA", 4, simd_width("neon", 32)),
            ),
            l1_bytes=32 * 1024,
            alignment=16,
            source="Arm Cortex-A78 Core Technical Reference Manual: Armv8.2-A with dot product; L1D of 32 or 64 KiB",
        ),
        Target(
            "gpu-tensor-core",
            (
                Arithmetic(8, True, 32, "mma.m16n8k32", 4096, 16),
                Arithmetic(16, False, 32, "mma.m16n8k16", 2048, 8),
                Arithmetic(32, False, 32, "FFMA", 32, 4),
            ),
            l1_bytes=64 * 1024,
            alignment=16,
            source="NVIDIA PTX ISA (mma, compute capability 8.0) and Deep Learning Performance Guide (multiples of 16 "
            "bytes); 64 KiB: what a block may use of shared memory on Turing, newer ones have more",
        ),
    )
}
"""Machines by name. Figures of instruction sets, not measurements; another machine is a :class:`Target` of your own."""


def target(name: str | Target) -> Target:
    """A preset by its name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> target("cortex-a78").computes(8, integer=True).macs
        16
    """
    if isinstance(name, Target):
        return name
    if name not in TARGETS:
        raise ValueError(f"The target must be one of {sorted(TARGETS)} or a `Target`, got {name!r}.")
    return TARGETS[name]


def tile_bytes(tile: int, *, bits: int = 8, accumulator: int = 32) -> int:
    """Bytes of square tiles of both factors, and of their product, in a product of matrices.

    Args:
        tile: Rows and columns, positive.
        bits: Of both factors.
        accumulator: Bits of the sums.

    Raises:
        ValueError: If a number is not positive.

    Example:
        >>> tile_bytes(32), tile_bytes(32, bits=32)
        (6144, 12288)
    """
    for name, value in (("tile", tile), ("bits", bits), ("accumulator", accumulator)):
        if value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    return math.ceil(tile * tile * (2 * bits + accumulator) / 8)


def tile_size(l1_bytes: int, *, bits: int = 8, accumulator: int = 32, multiple: int = 16) -> int:
    """The largest square tile, a multiple of ``multiple``, of which three stay in the first cache.

    An upper bound: a real cache also holds other data, and is not freely filled.

    Args:
        l1_bytes: Of the cache.
        bits: Of both factors.
        accumulator: Bits of the sums.
        multiple: Values of a vector, positive.

    Raises:
        ValueError: If a number is not positive, or not even the smallest tile fits.

    Example:
        >>> tile_size(32 * 1024)
        64
    """
    if multiple < 1:
        raise ValueError(f"`multiple` must be positive, got {multiple}.")
    if tile_bytes(multiple, bits=bits, accumulator=accumulator) > l1_bytes:
        raise ValueError(
            f"`l1_bytes` is {l1_bytes}, but tiles of {multiple} need "
            f"{tile_bytes(multiple, bits=bits, accumulator=accumulator)}."
        )
    side = math.isqrt(8 * l1_bytes // (2 * bits + accumulator))
    return side // multiple * multiple
