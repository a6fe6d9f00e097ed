"""Quantized linear layers as tensors of torchao, with the steps that training has found."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.modes import inference
from lightning_distill.quantization.integers import integer_weight
from lightning_distill.quantization.layers import QuantizedLinear
from lightning_distill.quantization.network import Network, quantized_layers, require_in_force
from lightning_distill.quantization.onnx_runtime import Inputs, as_tuple
from lightning_distill.quantization.quantized_layer import QuantizedLayer


def to_torchao(model: Network, inputs: Inputs) -> Network:
    """A copy of ``model`` whose quantized layers are ``nn.Linear`` again, with weights that torchao computes with.

    Codes and steps are those of training: torchao chooses none. Codes of all numbers of bits are stored as int8. A
    layer that quantizes its input to 8 bits multiplies whole numbers, with the trained range: faster than float32 on a
    CPU where the copy went through ``torch.compile`` and reads several rows. Other layers compute in floating point,
    smaller and not faster.

    The copy's ``state_dict`` is a file's content: ``torch.save`` it, and ``load_state_dict(..., assign=True)`` it into
    the network as it was before :func:`~lightning_distill.quantization.prepare`.

    Args:
        model: A network whose quantized layers are all linear ones; it is run in eval mode and not changed.
        inputs: One batch: a tensor, several, or a mapping of keyword arguments. torchao's ranges of inputs are for as
            many dimensions as a layer reads, which this shows; sizes may differ later.

    Raises:
        ModuleNotFoundError: If torchao is missing (the extra ``torchao``).
        ValueError: If the model has no quantized layer, is not calibrated, or its quantization is not wholly in force;
            if a layer is a convolution or an embedding, has 8 bits and no level at 0, reads inputs of fewer than 8
            bits, or quantizes its inputs while its weights are in groups or in floating point; or if a layer that
            quantizes its inputs reads such of several numbers of dimensions, or none.

    Example:
        >>> from lightning_distill.quantization import QuantSpec, prepare
        >>> network = prepare(nn.Sequential(nn.Linear(8, 2)), QuantSpec(weights=4))
        >>> x = torch.ones(3, 8)
        >>> torch.allclose(to_torchao(network, x)(x), network(x), atol=1e-5)
        True
    """
    _require_package()
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("`model` has no quantized layer; call `prepare(model, spec)` first.")
    require_in_force(model)
    for name, layer in layers.items():
        _check(layer, name)
    dimensions = _dimensions_read(model, layers, inputs)
    network = copy.deepcopy(model)
    for name, layer in quantized_layers(network).items():
        weight = _weight_of(layer, dimensions.get(name, 2))
        layer.become_plain()
        layer.weight = nn.Parameter(weight, requires_grad=False)
    return network


def _check(layer: QuantizedLayer, name: str) -> None:
    bits, activations = layer.weight_bits, layer.activation_bits
    if not isinstance(layer, QuantizedLinear):
        raise ValueError(
            f"torchao has no kernel for {name!r}, a {type(layer).__name__}: leave it out, `skip=[{name!r}]`, or write "
            "the network by `export_onnx` or `write_packed`."
        )
    if bits <= 8 and int(integer_weight(layer).symmetric().codes.abs().max()) > 127:
        raise ValueError(
            f"The layer {name!r} has 8 bits with levels half a step beside 0, which int8 does not hold. Use "
            "scheme='lsq', or fewer bits."
        )
    if activations is None:
        return
    if activations != 8:
        raise ValueError(f"The layer {name!r} reads inputs of {activations} bits; torchao rounds them to 8 bits.")
    if bits > 8:
        raise ValueError(f"The layer {name!r} rounds its inputs but not its weights, which torchao cannot.")
    if layer.effective_scale().shape[1] > 1:
        raise ValueError(
            f"The layer {name!r} rounds its inputs and has a step per group of weights; torchao needs one per channel."
        )


def _dimensions_read(model: nn.Module, layers: Mapping[str, QuantizedLayer], inputs: Inputs) -> dict[str, int]:
    """How many dimensions the input of each layer has that quantizes it."""
    seen: dict[str, set[int]] = {name: set() for name, layer in layers.items() if layer.needs_range}
    handles = [
        layers[name].register_forward_pre_hook(
            lambda _, args, named, found=found: found.add((*args, *named.values())[0].ndim), with_kwargs=True
        )
        for name, found in seen.items()
    ]
    try:
        with inference(model):
            _ = model(**inputs) if isinstance(inputs, Mapping) else model(*as_tuple(inputs))
    finally:
        for handle in handles:
            handle.remove()
    for name, found in seen.items():
        if len(found) != 1:
            raise ValueError(
                f"The layer {name!r} rounds inputs of {sorted(found) or 'no'} dimensions; torchao needs one number of "
                f"them, in a network that runs all its layers. Leave it out: `skip=[{name!r}]`."
            )
    return {name: found.pop() for name, found in seen.items()}


def _weight_of(layer: QuantizedLayer, dimensions: int) -> Tensor:
    from torchao.quantization import Int8Tensor, MappingType, PerRow, PerTensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    dtype = layer.weight.dtype
    if layer.weight_bits > 8:
        return layer.quantized_weight().detach().clone()
    found = integer_weight(layer).symmetric()
    codes, scale = found.codes.flatten(1).to(torch.int8), found.scale.squeeze(-1)
    inputs: dict[str, Any] = {}
    if layer.activation_bits is not None and not layer.needs_range:
        inputs = {"act_quant_kwargs": QuantizeTensorToInt8Kwargs(PerRow(), MappingType.ASYMMETRIC)}
    elif layer.activation_bits is not None:
        shape = (1,) * dimensions
        inputs = {
            "act_quant_kwargs": QuantizeTensorToInt8Kwargs(PerTensor(), MappingType.ASYMMETRIC),
            "act_quant_scale": layer.activation_scale.detach().float().reshape(shape).clone(),
            # codes from 0 to 255 there are codes from -128 to 127 here
            "act_quant_zero_point": (layer.activation_zero_point.detach() - 128).to(torch.int8).reshape(shape),
        }
    weight: Tensor = Int8Tensor(codes, scale, [1, codes.shape[1] // scale.shape[1]], dtype, **inputs)
    return weight


def _require_package() -> None:
    import importlib.util

    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError("Weights for torchao need it: `pip install lightning-distill[torchao]`.")
