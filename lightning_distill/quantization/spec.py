"""What is quantized, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scheme = Literal["auto", "lsq", "seq", "fixed", "minmax"]
Gradient = Literal["ste", "dsq"]
ActivationRange = Literal["layer", "token"]
LEFT_ALONE = (16, 32)
"""Numbers of bits that are kept in floating point."""
ALL_BITS = (*range(1, 9), *LEFT_ALONE)
Bits = int | tuple[int, ...]
"""Of a layer's weights: one number, or one for each output channel."""


@dataclass(frozen=True)
class QuantSpec:
    """How the layers of a network are quantized.

    Attributes:
        weights: Bits of a weight, 1 to 8; ``"binary"`` and ``"ternary"`` for levels that follow from the weights
            (XNOR-Net, TWN); 16 rounds to half precision, 32 leaves weights alone. Or 1 to 8 bits for each output
            channel of a layer, ``(8, 4, 4, 2)``.
        activations: Bits of what a layer reads, 2 to 8; ``None`` leaves it alone.
        granularity: Which weights share a step: ``"channel"`` (an output channel), ``"tensor"`` (all), or
            ``"group:32"`` (32 neighbours along a channel's inputs).
        scheme: ``"lsq"``: levels around 0, -7 … 7 with 4 bits, with a learned step. ``"seq"``: as many levels as codes,
            half a step beside 0, with a learned step. ``"auto"``: ``"seq"`` with 1 and 2 bits, else ``"lsq"``.
            ``"fixed"``: the levels of ``"auto"`` with the steps that calibration found. ``"minmax"``: levels around 0
            up to the largest weight of the moment.
        gradient: ``"ste"`` passes gradients straight through the rounding; ``"dsq"`` through a soft staircase whose
            sharpness is learned.
        activation_range: ``"layer"``: one range for what a layer reads, found by calibration and trained where steps
            are. ``"token"``: each vector that a linear layer reads has its own, from its least to its largest number
            (dynamic quantization, usual for language models, whose tokens differ by orders of magnitude).

    Raises:
        ValueError: If a value is none of these.

    Example:
        >>> QuantSpec(weights=4, activations=8).granularity
        'channel'
    """

    weights: Bits | Literal["binary", "ternary"] = 8
    activations: int | None = None
    granularity: str = "channel"
    scheme: Scheme = "auto"
    gradient: Gradient = "ste"
    activation_range: ActivationRange = "layer"

    def __post_init__(self) -> None:
        if self.activations is not None and not (_is_whole(self.activations) and 2 <= self.activations <= 8):
            raise ValueError(
                f"`activations` must be 2 to 8 bits, or None to leave them alone, got {self.activations!r}."
            )
        if self.scheme not in ("auto", "lsq", "seq", "fixed", "minmax"):
            raise ValueError(f"`scheme` must be 'auto', 'lsq', 'seq', 'fixed' or 'minmax', got {self.scheme!r}.")
        if self.gradient not in ("ste", "dsq"):
            raise ValueError(f"`gradient` must be 'ste' or 'dsq', got {self.gradient!r}.")
        if self.activation_range not in ("layer", "token"):
            raise ValueError(f"`activation_range` must be 'layer' or 'token', got {self.activation_range!r}.")
        if self.activation_range == "token" and self.activations is None:
            raise ValueError("`activation_range` is 'token', but inputs are not quantized: set `activations=8`.")
        self.group_size  # noqa: B018  # checks the granularity
        if self.weights not in ("binary", "ternary"):
            object.__setattr__(self, "weights", self.checked_bits(self.weights, "weights"))  # a file has lists

    def checked_bits(self, bits: object, name: str) -> Bits:
        """``bits`` as weights of this spec may have them, a sequence as a tuple.

        Raises:
            ValueError: If they are neither 1 to 8, 16 or 32, nor 1 to 8 for each channel; if they are 1 and the scheme
                needs a level at 0; or if channels have their own and no steps of their own.
        """
        several = isinstance(bits, (list, tuple))
        found = tuple(bits) if isinstance(bits, (list, tuple)) else (bits,)
        if not found or not all(_is_whole(own) and own in (range(1, 9) if several else ALL_BITS) for own in found):
            one = "must be 1 to 8 bits, or 16 or 32 to keep floating point"
            raise ValueError(f"`{name}` {'must give each channel 1 to 8 bits' if several else one}, got {bits!r}.")
        if 1 in found and self.scheme in ("lsq", "minmax"):
            raise ValueError(
                f"One bit has no level at 0, which scheme={self.scheme!r} needs: use scheme='seq' or 'fixed', or "
                "weights='binary'."
            )
        if several and self.granularity == "tensor":
            raise ValueError(
                f"`{name}` gives each channel bits of its own, {bits!r}, but with granularity='tensor' all share one "
                "step: use granularity='channel'."
            )
        return found if several else found[0]

    @property
    def bits(self) -> Bits:
        """Bits that a weight takes in memory."""
        return {"binary": 1, "ternary": 2}[self.weights] if isinstance(self.weights, str) else self.weights

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


def mean_bits(bits: Bits) -> float:
    """Of a weight of a layer, whose channels are equally large."""
    return float(bits) if isinstance(bits, int) else sum(bits) / len(bits)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
