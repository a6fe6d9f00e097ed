"""What is quantized, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scheme = Literal["auto", "lsq", "seq", "fixed", "minmax"]
Gradient = Literal["ste", "dsq"]
LEFT_ALONE = (16, 32)
"""Numbers of bits that are kept in floating point."""
ALL_BITS = (*range(1, 9), *LEFT_ALONE)


@dataclass(frozen=True)
class QuantSpec:
    """How the layers of a network are quantized.

    Attributes:
        weights: Bits of a weight, 1 to 8; ``"binary"`` and ``"ternary"`` for levels that follow from the weights
            (XNOR-Net, TWN); 16 rounds to half precision, 32 leaves weights alone.
        activations: Bits of what a layer reads, 2 to 8, with one range per layer; ``None`` leaves it alone.
        granularity: Which weights share a step: ``"channel"`` (an output channel), ``"tensor"`` (all), or
            ``"group:32"`` (32 neighbours along a channel's inputs).
        scheme: ``"lsq"``: levels around 0, -7 … 7 with 4 bits, with a learned step. ``"seq"``: as many levels as codes,
            half a step beside 0, with a learned step. ``"auto"``: ``"seq"`` with 1 and 2 bits, else ``"lsq"``.
            ``"fixed"``: the levels of ``"auto"`` with the steps that calibration found. ``"minmax"``: levels around 0
            up to the largest weight of the moment.
        gradient: ``"ste"`` passes gradients straight through the rounding; ``"dsq"`` through a soft staircase whose
            sharpness is learned.

    Raises:
        ValueError: If a value is none of these.

    Example:
        >>> QuantSpec(weights=4, activations=8).granularity
        'channel'
    """

    weights: int | Literal["binary", "ternary"] = 8
    activations: int | None = None
    granularity: str = "channel"
    scheme: Scheme = "auto"
    gradient: Gradient = "ste"

    def __post_init__(self) -> None:
        if self.weights not in ("binary", "ternary"):
            check_bits("weights", self.weights)
        if self.activations is not None and not (_is_whole(self.activations) and 2 <= self.activations <= 8):
            raise ValueError(
                f"`activations` must be 2 to 8 bits, or None to leave them alone, got {self.activations!r}."
            )
        if self.scheme not in ("auto", "lsq", "seq", "fixed", "minmax"):
            raise ValueError(f"`scheme` must be 'auto', 'lsq', 'seq', 'fixed' or 'minmax', got {self.scheme!r}.")
        if self.gradient not in ("ste", "dsq"):
            raise ValueError(f"`gradient` must be 'ste' or 'dsq', got {self.gradient!r}.")
        if self.weights == 1 and self.scheme in ("lsq", "minmax"):
            raise ValueError(
                f"One bit has no level at 0, which scheme={self.scheme!r} needs: use scheme='seq' or 'fixed', or "
                "weights='binary'."
            )
        self.group_size  # noqa: B018  # checks the granularity

    @property
    def weight_bits(self) -> int:
        """Bits that a weight takes in memory."""
        return {"binary": 1, "ternary": 2}.get(self.weights, self.weights)  # type: ignore[arg-type]

    @property
    def group_size(self) -> int | None:
        """Weights per group, where the granularity is one of groups."""
        kind, _, size = self.granularity.partition(":")
        if kind == "group" and size.isdecimal() and int(size) > 0:
            return int(size)
        if self.granularity not in ("channel", "tensor"):
            raise ValueError(
                f"`granularity` must be 'channel', 'tensor' or 'group:SIZE' such as 'group:32', got "
                f"{self.granularity!r}."
            )
        return None

    @property
    def learns(self) -> bool:
        """Whether step sizes are trained."""
        return self.scheme in ("auto", "lsq", "seq")


def check_bits(name: str, bits: object) -> None:
    """Refuse a number of bits that no quantizer here has.

    Raises:
        ValueError: If it is neither 1 to 8 nor 16 or 32.
    """
    if not (_is_whole(bits) and bits in ALL_BITS):
        raise ValueError(f"`{name}` must be 1 to 8 bits, or 16 or 32 to keep floating point, got {bits!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
