"""Quantized networks on disk, with as many bits per weight as they have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.files import draft_of
from lightning_distill.quantization.fake_quantize import SMALLEST_SCALE
from lightning_distill.quantization.integers import integer_weight
from lightning_distill.quantization.layers import QUANTIZED
from lightning_distill.quantization.network import prepare, quantizable_layers, quantized_layers, require_in_force
from lightning_distill.quantization.quantized_layer import QuantizedLayer
from lightning_distill.quantization.spec import QuantSpec

VERSION = "1"
_PLAN = "lightning_distill_quantization"
_REPLACED = ("weight", "log_weight_scale", "log_sharpness")


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Put whole numbers below ``2 ** bits`` side by side, ``bits`` bits each, the lowest bit first.

    Args:
        codes: Integers, any shape.
        bits: 1 to 8.

    Returns:
        Bytes: ``uint8``, shape ``(ceil(numel * bits / 8),)``.

    Raises:
        ValueError: If ``bits`` or a number is outside its range.

    Example:
        >>> pack_bits(torch.tensor([1, 2, 3, 0, 3]), 2)
        tensor([57,  3], dtype=torch.uint8)
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"`bits` must be 1 to 8, got {bits!r}.")
    if codes.numel() and not (codes.min() >= 0 and codes.max() < 2**bits):
        raise ValueError(f"`codes` must be from 0 to {2**bits - 1}, got {int(codes.min())} to {int(codes.max())}.")
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.flatten().to(torch.uint8)[:, None] >> places) & 1).flatten()
    stream = nn.functional.pad(stream, (0, -len(stream) % 8)).reshape(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream * weights).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """What :func:`pack_bits` was given: ``count`` whole numbers, ``uint8``."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> places) & 1).flatten()[: count * bits].reshape(count, bits)
    return (stream * 2 ** torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(dim=1, dtype=torch.uint8)


def write_packed(model: nn.Module, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a quantized network: packed codes, steps, and the rest as it is; whole or not at all.

    Args:
        model: A network that :func:`~lightning_distill.quantization.prepare` has quantized.
        path: A ``.safetensors`` file.
        overwrite: Whether a file at ``path`` may be replaced.

    Raises:
        FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
        ValueError: If ``model`` has no quantized layer, ``path`` does not end in ``.safetensors``, layers were not
            calibrated, or their quantization is not wholly in force.
    """
    from safetensors.torch import save_file

    path = Path(path)
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("`model` has no quantized layer; call `prepare(model, spec)` first.")
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in '.safetensors', got {str(path)!r}.")
    require_in_force(model)
    tensors = {name: value for name, value in model.state_dict().items() if name not in _replaced(layers)}
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": value for part, value in _packed(layer).items()}
    plan = {name: asdict(_spec_in_force(layer)) for name, layer in layers.items()}
    with draft_of(path, overwrite=overwrite) as draft:
        save_file(
            {name: _plain(tensor) for name, tensor in tensors.items()},
            str(draft),
            metadata={_PLAN: json.dumps({"version": VERSION, "layers": plan})},
        )


def read_packed(model: nn.Module, path: str | Path) -> nn.Module:
    """A network from a file of :func:`write_packed`.

    Args:
        model: Built as the one that was written, before quantization; it is quantized and filled in place.
        path: The file.

    Returns:
        ``model`` in eval mode; its weights are their levels, so that it says what the one that was written said.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of ours or of another version, ``model`` is quantized already, or the network is
            another one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no packed network at {str(path)!r}.")
    specs, stored = _read(path)
    modules = dict(model.named_modules())
    if absent := [name for name in specs if type(modules.get(name)) not in (*QUANTIZED, *QUANTIZED.values())]:
        raise ValueError(
            f"The network in {str(path)!r} has quantized layers {absent}, which this {type(model).__name__} has not."
        )
    left_alone = [name for name in quantizable_layers(model) if name not in specs]
    prepare(model, overrides={escape(name): spec for name, spec in specs.items()}, skip=[escape(n) for n in left_alone])
    layers = quantized_layers(model)
    for name, layer in layers.items():
        _fill(layer, name, stored)
    try:
        missing, unknown = model.load_state_dict(stored, strict=False)
    except RuntimeError as error:
        raise ValueError(f"The network in {str(path)!r} is not this {type(model).__name__}: {error}") from error
    wrong = [f"missing {name}" for name in missing if name not in _replaced(layers)]
    if wrong := wrong + [f"unknown {name}" for name in unknown]:
        raise ValueError(f"The network in {str(path)!r} is not this {type(model).__name__}: {'; '.join(wrong[:3])}.")
    return model.eval()


def _read(path: Path) -> tuple[dict[str, QuantSpec], dict[str, Tensor]]:
    """How each layer is quantized, and all tensors by name."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        plan = json.loads((file.metadata() or {}).get(_PLAN, "{}"))
        if plan.get("version") != VERSION:
            raise ValueError(
                f"{str(path)!r} is no packed network of version {VERSION}; `write_packed` writes them. Weights in "
                "floating point are read by `load_network`."
            )
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    return {name: QuantSpec(**spec) for name, spec in plan["layers"].items()}, stored


def _replaced(layers: Iterable[str]) -> set[str]:
    """Names of a network's state that :func:`_packed` stands for."""
    return {f"{name}.{part}" for name in layers for part in _REPLACED}


def _spec_in_force(layer: QuantizedLayer) -> QuantSpec:
    """The layer's spec with the bits that it has now."""
    bits: Any = layer.closed_form or layer.bits
    return replace(layer.spec, weights=bits)


def _packed(layer: QuantizedLayer) -> dict[str, Tensor]:
    if layer.weight_bits > 8:
        weight = layer.weight.detach()
        return {"weight": weight.half() if layer.weight_bits == 16 else weight}
    follows = layer.closed_form is not None or layer.spec.scheme == "minmax"
    steps = layer.effective_scale().clamp_min(SMALLEST_SCALE).log() if follows else layer.log_weight_scale
    codes = (integer_weight(layer).codes - layer.weight_grid.lowest).reshape(len(layer.log_weight_scale), -1)
    parts = [pack_bits(codes[rows].int(), bits) for bits, rows in layer.rows_of_bits()]
    return {"codes": torch.cat(parts), "log_weight_scale": steps}


def _fill(layer: QuantizedLayer, name: str, stored: dict[str, Tensor]) -> None:
    """Give ``layer`` its weights and steps out of ``stored``."""
    parts = ("weight",) if layer.weight_bits > 8 else ("codes", "log_weight_scale")
    if absent := [f"{name}.{part}" for part in parts if f"{name}.{part}" not in stored]:
        raise ValueError(f"The packed network lacks {absent}.")
    found = [stored.pop(f"{name}.{part}") for part in parts]
    with torch.no_grad():
        if layer.weight_bits > 8:
            layer.weight.copy_(_fitting(found[0], layer.weight.shape, name))
            return
        packed, steps = found
        layer.log_weight_scale.copy_(_fitting(steps, layer.log_weight_scale.shape, name))
        rows = layer.rows(layer.weight)
        groups = [(bits, numbers, len(numbers) * rows[0].numel()) for bits, numbers in layer.rows_of_bits()]
        sizes = [-(-count * bits // 8) for bits, _, count in groups]
        _fitting(packed, torch.Size([sum(sizes)]), name)
        codes = torch.empty_like(rows, dtype=torch.float32)
        for (bits, numbers, count), part in zip(groups, packed.to(rows.device).split(sizes), strict=True):
            codes[numbers] = unpack_bits(part, bits, count).float().reshape(-1, *rows.shape[1:])
        levels = codes + layer.weight_grid.lowest - layer.weight_grid.zero_point
        layer.weight.copy_(layer.from_rows(levels * layer.weight_scale))


def _fitting(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    if tensor.shape != shape:
        raise ValueError(f"The layer {name!r} has the shape {tuple(tensor.shape)} in the file, not {tuple(shape)}.")
    return tensor


def _plain(tensor: Tensor) -> Tensor:
    """A copy on the CPU: files of safetensors hold no shared memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()
