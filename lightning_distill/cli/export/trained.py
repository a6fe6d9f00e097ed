"""What is exported: a network, and samples that its copies are compared on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.compression.blocks import Block
from lightning_distill.export import standalone
from lightning_distill.modes import inference
from lightning_distill.quantization import quantized_layers, size_report, unprepare
from lightning_distill.quantization.onnx_runtime import Inputs, as_tuple, said
from lightning_distill.tasks import KEPT_FROM_MODELS, Task


@dataclass(frozen=True)
class Trained:
    """A checkpoint's student.

    Attributes:
        network: In eval mode on the CPU, quantized or not.
        task: How it reads a batch.
        batch: Samples of the training set.
        block: Rows and columns of the blocks that it was trained without; ``None`` if it was trained with all.
    """

    network: nn.Module
    task: Task
    batch: Any
    block: Block | None = None

    @property
    def inputs(self) -> Inputs:
        """What the network is called with."""
        if self.reads_tokens:
            return {key: value.cpu() for key, value in self.batch.items() if key not in KEPT_FROM_MODELS}
        return self.task.inputs(self.batch).detach().cpu()

    @property
    def reads_tokens(self) -> bool:
        """Whether a batch has sequences of tokens, each entry of shape ``(B, T)``."""
        return isinstance(self.batch, Mapping) and "input_ids" in self.batch

    @property
    def samples(self) -> int:
        """How many there are in the batch."""
        return self.task.batch_size(self.batch)

    @property
    def float32_bytes(self) -> int:
        """Size of the network's weights and buffers in float32."""
        if quantized_layers(self.network):
            return size_report(self.network).float32_bytes
        return 4 * sum(tensor.numel() for tensor in (*self.network.parameters(), *self.network.buffers()))

    def before(self) -> nn.Module:
        """A copy of the network as it was before quantization, its weights in floating point."""
        return unprepare(standalone(self.network))

    @torch.no_grad()
    def blank(self) -> nn.Module:
        """Such a copy without any weights: what a file does not fill stays NaN."""
        network = self.before()
        for value in network.state_dict().values():
            if isinstance(value, Tensor):
                value.fill_(torch.nan if value.is_floating_point() else 0)
        return network

    def said_by(self, network: nn.Module) -> Tensor:
        """What the task makes of a network's outputs for the samples."""
        with inference(network):
            return self.task.run(network, self.batch).logits

    def output_of(self, network: nn.Module) -> Tensor:
        """What a network says itself, called as it will be elsewhere."""
        with inference(network):
            return said(call(network, self.inputs))


def call(network: Callable[..., Any], inputs: Inputs) -> Any:
    """What ``network`` returns for ``inputs``."""
    return network(**inputs) if isinstance(inputs, Mapping) else network(*as_tuple(inputs))


def difference(found: Tensor, expected: Tensor, tolerance: float) -> float:
    """Root of the squared differences of outputs over that of the squares of ``expected``.

    Raises:
        RuntimeError: If it is more than ``tolerance``.
    """
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= tolerance:
        raise RuntimeError(
            f"read again, the outputs differ by {error:.3g} of their size, more than {tolerance:g}; nothing was "
            "written."
        )
    return error
