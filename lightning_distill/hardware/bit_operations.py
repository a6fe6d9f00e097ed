"""Work of a network in bit operations: what its arithmetic would cost if it went down with the bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_distill.hardware.counting import count_costs
from lightning_distill.quantization import quantized_layers


def bit_operations(model: nn.Module, batch: Any, *, run: Callable[[nn.Module, Any], Any] | None = None) -> float:
    """Multiply-adds times bits of a weight times bits of an input, of all layers.

    As in van Baalen et al. (2020), Bayesian Bits. An ideal: a machine that computes in 8 bits and no less takes as
    long for 2 bits as for 8. Products without a quantized layer, such as attention, count with the network's own width.

    Args:
        model: Any network; it is left as it was.
        batch: What it reads.
        run: See :func:`~lightning_distill.hardware.count_costs`.

    Returns:
        Of the whole batch.

    Example:
        >>> import torch
        >>> from lightning_distill.quantization import QuantSpec, calibrate, prepare
        >>> model, batch = prepare(nn.Sequential(nn.Linear(4, 2)), QuantSpec(2, activations=8)), torch.randn(3, 4)
        >>> calibrate(model, [batch])
        >>> bit_operations(model, batch) == 3 * 4 * 2 * 2 * 8
        True
    """
    layers = quantized_layers(model)
    total = []
    for cost in count_costs(model, batch, run=run):
        layer = layers.get(cost.name)
        inputs = cost.compute_bits if layer is None or layer.activation_bits is None else layer.activation_bits
        total.append(cost.flops / 2 * cost.weight_bits * inputs)
    return math.fsum(total)
