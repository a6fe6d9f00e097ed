"""Latency from operations and bytes. An operation is a multiplication or an addition: one MAC is two of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Tensor | Sequence[float] | float


def numbers(values: Numbers, name: str, low: float = 0.0, high: float = float("inf")) -> Tensor:
    """``values`` in float64, each checked to be finite and in ``[low, high]``."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    wrong = ~((tensor >= low) & (tensor <= high) & tensor.isfinite())
    if wrong.any():
        raise ValueError(f"`{name}` must be finite and in [{low:g}, {high:g}], got {tensor[wrong][0].item():g}.")
    return tensor


def positive(values: Numbers, name: str) -> Tensor:
    """``values`` in float64, each checked to be finite and above 0."""
    tensor = torch.as_tensor(values, dtype=torch.float64)
    wrong = ~((tensor > 0) & tensor.isfinite())
    if wrong.any():
        raise ValueError(f"`{name}` must be positive and finite, got {tensor[wrong][0].item():g}.")
    return tensor


def speedup(bits: Numbers) -> Tensor:
    """Ideal speed-up ``32 / bits`` over float32, from the number of values in a vector register.

    An upper bound: it holds where the instruction set has arithmetic of that width and nothing waits for memory.

    Args:
        bits: Width of a value, positive, any shape.

    Raises:
        ValueError: If a width is not positive and finite.

    Example:
        >>> speedup([2, 4, 8, 16, 32]).tolist()
        [16.0, 8.0, 4.0, 2.0, 1.0]
    """
    return 32 / positive(bits, "bits")


def effective_throughput(peak: Numbers, *, miss_rate: Numbers, penalty: float) -> Tensor:
    """Throughput with cache misses, ``peak / (1 + miss_rate * penalty)``: always in ``(0, peak]``.

    Average access time of Hennessy and Patterson, with the time of a hit as the unit.

    Args:
        peak: Operations per second without misses, positive.
        miss_rate: Share of accesses that miss, in [0, 1]; broadcasts with ``peak``.
        penalty: Time of a miss in units of the time of a hit, at least 0.

    Raises:
        ValueError: If a number is out of its range.
    """
    misses = numbers(miss_rate, "miss_rate", high=1.0)
    return positive(peak, "peak") / (1 + misses * numbers(penalty, "penalty"))


def compute_latency(
    ops: Numbers, bits: Numbers, *, peak: float, sparsity: Numbers = 0.0, sparsity_efficiency: float = 1.0
) -> Tensor:
    """Seconds per layer from arithmetic alone: ``ops * (1 - efficiency * sparsity) / (peak * 32 / bits)``.

    Knows nothing of memory, see :func:`roofline_latency`. The layers run one after the other: sum for the network.

    Args:
        ops: Operations of each layer, two per MAC, at least 0.
        bits: Width of each layer's values, positive; broadcasts with ``ops``.
        peak: Operations per second in float32, positive.
        sparsity: Share of the weights that are zero, in [0, 1].
        sparsity_efficiency: Share of the zeros whose operations are really left out, in [0, 1]. 1 is the ideal, and
            0 a runtime that multiplies by the zeros.

    Raises:
        ValueError: If a number is out of its range.
    """
    zeros = numbers(sparsity, "sparsity", high=1.0)
    skipped = zeros * numbers(sparsity_efficiency, "sparsity_efficiency", high=1.0)
    return numbers(ops, "ops") * (1 - skipped) / (positive(peak, "peak") * speedup(bits))


def roofline_latency(ops: Numbers, bytes_moved: Numbers, *, peak: Numbers, bandwidth: float) -> Tensor:
    """Seconds per layer: the longer one of computing and of moving the bytes (Williams et al. 2009).

    Args:
        ops: Operations of each layer, two per MAC, at least 0.
        bytes_moved: Bytes of weights, inputs and outputs of each layer, at least 0.
        peak: Operations per second at each layer's width, positive.
        bandwidth: Bytes per second, positive.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> roofline_latency([8.0, 1.0], [1.0, 4.0], peak=4.0, bandwidth=2.0).tolist()
        [2.0, 2.0]
    """
    computing = numbers(ops, "ops") / positive(peak, "peak")
    return torch.maximum(computing, numbers(bytes_moved, "bytes_moved") / positive(bandwidth, "bandwidth"))
