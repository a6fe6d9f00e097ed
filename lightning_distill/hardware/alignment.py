"""Numbers of channels that fill vector registers."""

from typing import Literal

VECTOR_BITS = {"neon": 128, "avx2": 256, "avx512": 512}
Mode = Literal["floor", "nearest", "ceil"]


def simd_width(isa: str, bits: int) -> int:
    """How many values of ``bits`` bits fit in one vector register.

    Args:
        isa: ``"neon"`` (128 bits), ``"avx2"`` (256) or ``"avx512"`` (512).
        bits: Width of a value: 8, 16, 32 or 64.

    Raises:
        ValueError: If ``isa`` or ``bits`` is unknown.

    Example:
        >>> simd_width("neon", 8), simd_width("avx512", 32)
        (16, 16)
    """
    if isa not in VECTOR_BITS:
        raise ValueError(f"`isa` must be one of {sorted(VECTOR_BITS)}, got {isa!r}.")
    if bits not in (8, 16, 32, 64):
        raise ValueError(f"`bits` must be 8, 16, 32 or 64, got {bits}.")
    return VECTOR_BITS[isa] // bits


def is_aligned(channels: int, width: int) -> bool:
    """Whether ``channels`` fill whole vectors of ``width`` values."""
    _check(channels, width)
    return channels % width == 0


def align_channels(channels: int, width: int, *, mode: Mode = "floor") -> int:
    """The multiple of ``width`` for a layer of ``channels`` channels: at least one vector, never 0.

    Args:
        channels: Channels that are wanted, positive.
        width: Values per vector, see :func:`simd_width`, positive.
        mode: ``"floor"`` and ``"ceil"`` go down and up; ``"nearest"`` to the closer one, from the middle up.

    Raises:
        ValueError: If a number is not positive or ``mode`` is unknown.

    Example:
        >>> [align_channels(8, 16), align_channels(40, 16), align_channels(40, 16, mode="nearest")]
        [16, 32, 48]
    """
    _check(channels, width)
    if mode not in ("floor", "nearest", "ceil"):
        raise ValueError(f"`mode` must be 'floor', 'nearest' or 'ceil', got {mode!r}.")
    extra = {"floor": 0, "nearest": width // 2, "ceil": width - 1}[mode]
    return max(width, (channels + extra) // width * width)


def _check(channels: int, width: int) -> None:
    for name, value in (("channels", channels), ("width", width)):
        if value < 1:
            raise ValueError(f"`{name}` must be positive, got {value}.")
