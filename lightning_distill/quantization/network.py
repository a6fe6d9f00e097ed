"""Networks whose layers are quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from lightning_distill.adapters import has_adapter
from lightning_distill.modes import inference, run_batch
from lightning_distill.quantization.layers import QUANTIZED
from lightning_distill.quantization.quantized_layer import QuantizedLayer, check_fit
from lightning_distill.quantization.spec import Bits, QuantSpec

Network = TypeVar("Network", bound=nn.Module)
Overrides = Mapping[str, QuantSpec | Bits | Sequence[int]]


def prepare(
    model: Network, spec: QuantSpec | None = None, *, overrides: Overrides | None = None, skip: Sequence[str] = ()
) -> Network:
    """Let the layers of ``model`` compute with quantized weights, in place.

    These are ``Linear``, ``Conv1d`` … ``Conv3d``, ``ConvTranspose1d`` … ``3d`` and ``Embedding``. Weights keep their
    names and stay in floating point underneath, so that they can be trained; steps of the weights are set at once,
    ranges of inputs by :func:`calibrate`. Of a model with a PEFT adapter the base is quantized, the adapter not.

    Args:
        model: Any network. ``nn.MultiheadAttention`` is left alone: it does not call its layers.
        spec: For all layers without an override. Default: 8-bit weights.
        overrides: Other specs, or numbers of bits of the weights (one, or one for each output channel), by name of a
            layer or pattern (``"blocks.*.mlp"``). Later ones win. Numbers keep the rest of ``spec``.
        skip: Names or patterns of layers that stay in floating point.

    Returns:
        ``model``.

    Raises:
        ValueError: If a name or pattern fits no layer, there is nothing to quantize, the model is quantized already, a
            weight is shared with another layer, groups do not divide a layer, or there are bits for other channels
            than a layer has; nothing is changed then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> model = prepare(model, QuantSpec(weights=4), overrides={"2": 8})
        >>> [layer.weight_bits for layer in quantized_layers(model).values()]
        [4, 8]
    """
    if quantized_layers(model):
        raise ValueError("`model` is quantized already; change its bits with `set_bits`.")
    spec = QuantSpec() if spec is None else spec
    candidates = quantizable_layers(model)
    specs = dict.fromkeys(candidates, spec)
    for pattern, override in (overrides or {}).items():
        for name in _matching(pattern, candidates, "overrides"):
            bits: Any = override
            specs[name] = override if isinstance(override, QuantSpec) else replace(spec, weights=bits)
    for pattern in skip:
        for name in _matching(pattern, candidates, "skip"):
            specs.pop(name, None)
    if not specs:
        raise ValueError(f"{type(model).__name__} has no layer to quantize: there are {list(candidates) or 'none'}.")
    _refuse_shared(model, specs)
    for name, own in specs.items():
        check_fit(candidates[name], own, name)
    for name, own in specs.items():
        module: Any = candidates[name]
        module.__class__ = QUANTIZED[type(module)]
        module.become_quantized(own)
    for block in model.modules():  # whose fused inference reads weights past their layers
        if isinstance(block, nn.TransformerEncoderLayer) and quantized_layers(block):
            block.activation_relu_or_gelu = 0
        if isinstance(block, nn.TransformerEncoder) and quantized_layers(block):
            block.use_nested_tensor = False
    return model


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of ``model`` that :func:`prepare` can quantize, by name; those of an adapter are not."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) in QUANTIZED and not (has_adapter(model) and _in_adapter(name))
    }


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of ``model`` by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def set_bits(model: nn.Module, plan: Mapping[str, Bits | Sequence[int]]) -> None:
    """Give the weights of some layers other numbers of bits. Their steps are found anew; no parameter comes or goes.

    Args:
        model: A network that :func:`prepare` has quantized.
        plan: Bits by name of a layer: 1 to 8, 16 or 32, or 1 to 8 for each output channel.

    Raises:
        ValueError: If a layer does not exist or a number of bits has no quantizer; nothing is changed then.
    """
    layers = quantized_layers(model)
    if unknown := [name for name in plan if name not in layers]:
        raise ValueError(f"`plan` names {unknown}, which are no quantized layers; there are {list(layers)}.")
    for name, bits in plan.items():
        layers[name].checked_bits(bits, name)
    for name, bits in plan.items():
        layers[name].set_bits(bits, name)


def calibrate(
    model: nn.Module, batches: Iterable[Any] = (), *, run: Callable[[nn.Module, Any], Any] | None = None
) -> None:
    """Find the steps of the weights and, from ``batches``, the ranges of what the layers read.

    Args:
        model: A network that :func:`prepare` has quantized; it is run in eval mode, without quantization.
        batches: A few batches such as it will see. Not needed where only weights are quantized.
        run: Lets the model read a batch. Default: ``model(batch)``, ``model(*inputs)`` of ``(inputs..., labels)``
            with only the first one, or ``model(**batch)`` of a mapping.

    Raises:
        ValueError: If the model has no quantized layer, or one whose input's range is needed was not used by any batch.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("`model` has no quantized layer; call `prepare(model, spec)` first.")
    for layer in layers.values():
        layer.calibrate_weight()
    reading = {name: layer for name, layer in layers.items() if layer.needs_range}
    if not reading:
        return
    with ExitStack() as stack:
        for layer in reading.values():
            stack.enter_context(layer.observing())
        stack.enter_context(full_precision(model))
        stack.enter_context(inference(model))
        for batch in batches:
            (run or run_batch)(model, batch)
    if unseen := [name for name, layer in reading.items() if not layer.is_calibrated]:
        raise ValueError(
            f"No batch came by the layers {unseen}, so that the range of what they read is not known. Give `batches` "
            "that use them, or leave the layers out: `skip=[...]`."
        )


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Within this context ``model`` computes in floating point, as if it were not quantized."""
    layers = list(quantized_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def unprepare(model: Network) -> Network:
    """Take the quantization of ``model`` off, in place: its layers are what they were, with weights in floating point.

    Fused inference of transformer blocks, which :func:`prepare` has switched off, stays off.

    Returns:
        ``model``.
    """
    for layer in quantized_layers(model).values():
        layer.become_plain()
    return model


def set_alpha(model: nn.Module, alpha: float) -> None:
    """How much of the quantization of ``model`` is in force; see :func:`~lightning_distill.quantization.blend`.

    Raises:
        ValueError: If ``alpha`` is outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}.")
    for layer in quantized_layers(model).values():
        layer.alpha = alpha


def require_in_force(model: nn.Module) -> None:
    """Refuse a network whose layers do not quantize in full.

    Raises:
        ValueError: If layers were not calibrated, or their quantization is not wholly in force.
    """
    layers = quantized_layers(model)
    if unknown := [name for name, layer in layers.items() if not layer.is_calibrated]:
        raise ValueError(
            f"The ranges of what the layers {unknown} read are not known. Call `calibrate(model, batches)` first."
        )
    if partly := [name for name, layer in layers.items() if layer.alpha != 1 or not layer.enabled]:
        raise ValueError(
            f"The layers {partly} are not wholly quantized. Call `set_alpha(model, 1.0)`, and leave `full_precision`."
        )


def _matching(pattern: str, names: Iterable[str], argument: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise ValueError(
            f"`{argument}` has {pattern!r}, which fits no layer that can be quantized; there are {list(names)}."
        )
    return found


def _in_adapter(name: str) -> bool:
    return any(part.startswith(("lora_", "modules_to_save", "adalora_", "vera_", "ia3_")) for part in name.split("."))


def _refuse_shared(model: nn.Module, names: Iterable[str]) -> None:
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    for name in names:
        if len(shared := holders[id(model.get_submodule(name).weight)]) > 1:
            raise ValueError(
                f"The layers {shared} share one weight, which would be quantized in one and not, or otherwise, in the "
                f"other. Leave them out, `skip={shared}`, or give each its own: "
                f"`layer.weight = nn.Parameter(layer.weight.detach().clone())`."
            )
