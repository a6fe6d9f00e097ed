"""Take the mean error of each output channel into the bias."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.modes import inference
from lightning_distill.quantization import quantized_layers
from lightning_distill.tasks import Classification, Task

CORRECTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def bias_correction(weight: Tensor, quantized: Tensor, mean_input: Tensor) -> Tensor:
    r"""What a linear layer's bias lacks after its weight was rounded: :math:`(W - Q(W)) \, E[x]`.

    That is :math:`E[W x - Q(W) x]`: with it the mean of every output is that of the layer before (Nagel et al. 2019,
    section 4.2). Quantizing :math:`W x` itself would leave that quantizer's own error in the mean.

    Args:
        weight: Before rounding, shape ``(out, in)``.
        quantized: After it, same shape.
        mean_input: Mean of the layer's inputs, shape ``(in,)``.

    Returns:
        To be added to the bias, shape ``(out,)``.

    Raises:
        ValueError: If the shapes do not match.

    Example:
        >>> bias_correction(torch.tensor([[0.6, -0.2]]), torch.tensor([[0.5, 0.0]]), torch.tensor([1.0, 2.0]))
        tensor([-0.3000])
    """
    if weight.shape != quantized.shape or weight.ndim != 2 or mean_input.shape != weight.shape[1:]:
        raise ValueError(
            "`weight` and `quantized` must have the shape (out, in) and `mean_input` (in,), got "
            f"{tuple(weight.shape)}, {tuple(quantized.shape)} and {tuple(mean_input.shape)}."
        )
    return (weight - quantized) @ mean_input


@torch.no_grad()
def correct_bias(
    network: nn.Module, batches: Iterable[Any], reference: nn.Module | None = None, *, task: Task | None = None
) -> list[str]:
    r"""Correct the biases of a quantized network such that each layer's mean outputs are those of its original.

    Layer by layer, in the order in which they run: for the inputs that the corrected layers before give,
    :math:`b \leftarrow b + E[W x - Q(W) x]`, the mean over samples and positions. Layers without a bias are left alone;
    where batch normalization follows them, :func:`~lightning_distill.recovery.recalibrate_batch_norm` does the same.

    Args:
        network: Quantized; changed in place.
        batches: A few hundred samples are enough; no label is needed. They are gone through once per layer.
        reference: The network before quantization, with layers of the same names; not changed. By default ``network``
            itself without the quantization of its layers, for one from
            :func:`~lightning_distill.quantization.prepare`.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Returns:
        Names of the corrected layers, in order.

    Raises:
        ValueError: If no layer with a bias is in both networks, there are no batches, or no layer of ``network`` is
            quantized and there is no ``reference``.
    """
    task = Classification() if task is None else task
    batches = list(batches)
    if not batches:
        raise ValueError("`batches` is empty: there is nothing to take means of.")
    reference = _without_quantization(network) if reference is None else reference
    originals = dict(reference.named_modules())
    pairs = {
        name: (module, originals[name])
        for name, module in network.named_modules()
        if isinstance(module, CORRECTED) and module.bias is not None and isinstance(originals.get(name), CORRECTED)
    }
    if not pairs:
        raise ValueError(
            f"{type(network).__name__} and {type(reference).__name__} have no linear or convolution layer with a bias "
            "in common to correct. Use `recalibrate_batch_norm` where there is batch normalization."
        )
    with inference(network), inference(reference):
        for name in (order := _order(network, pairs, batches[0], task)):
            layer, original = pairs[name]
            found = _MeanDifference(original)
            handle = layer.register_forward_hook(found.look)
            try:
                for batch in batches:
                    task.run(network, batch)
            finally:
                handle.remove()
            assert layer.bias is not None
            layer.bias += found.mean.to(layer.bias.dtype)
    return order


def _without_quantization(network: nn.Module) -> nn.Module:
    if not quantized_layers(network):
        raise ValueError(
            f"{type(network).__name__} has no quantized layer that could be compared with itself. Pass `reference`, "
            "the network before its weights were rounded."
        )
    original = copy.deepcopy(network)
    for layer in quantized_layers(original).values():
        layer.enabled = False
    return original


class _MeanDifference:
    """Mean over samples and positions of the original layer's output minus the quantized layer's, by channel."""

    def __init__(self, original: nn.Module) -> None:
        self.original = original
        self.channels = 1 if isinstance(original, nn.modules.conv._ConvNd) else -1
        self.total: Tensor | None = None
        self.count = 0

    @property
    def mean(self) -> Tensor:
        assert self.total is not None
        return self.total / self.count

    def look(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        error = (self.original(inputs[0]) - output).double().movedim(self.channels, 0).flatten(1)
        self.total = error.sum(dim=1) if self.total is None else self.total + error.sum(dim=1)
        self.count += error.shape[1]


def _order(network: nn.Module, pairs: dict[str, Any], batch: Any, task: Task) -> list[str]:
    """Names in the order in which the layers run; those that do not are left out."""
    ran: dict[str, None] = {}
    handles = [
        layer.register_forward_hook(lambda *_, name=name: ran.setdefault(name)) for name, (layer, _) in pairs.items()
    ]
    try:
        task.run(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(ran)


__all__ = ["bias_correction", "correct_bias"]
