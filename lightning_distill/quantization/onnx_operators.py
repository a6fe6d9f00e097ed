"""Operators of ONNX in a network that is exported."""

from __future__ import annotations

import torch
from torch import Tensor

OPSET = 21
"""The first one with 4-bit numbers and steps of groups."""


def operator(
    name: str,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    shape: torch.Size | tuple[int, ...],
    version: int = OPSET,
    **attributes: int,
) -> Tensor:
    """What stands for the operator ``name`` while a network is exported; its value is only known in ONNX.

    Args:
        name: With its domain, if that is not ONNX's own.
        inputs: Of the operator.
        dtype: Of its output.
        shape: Of its output.
        version: Of its domain.
        attributes: Of the operator.
    """
    return torch.onnx.ops.symbolic(name, inputs, dict(attributes), dtype=dtype, shape=shape, version=version)
