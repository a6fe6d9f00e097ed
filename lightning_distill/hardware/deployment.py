"""Whether a network suits the machine that it is meant for: formats, channels, fusion, memory, batches."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_distill.hardware.alignment import align_channels, is_aligned
from lightning_distill.hardware.calibration import measure_latency
from lightning_distill.hardware.counting import count_costs
from lightning_distill.hardware.fusion import PRODUCTS, Followed, Fusion, find_fusions
from lightning_distill.hardware.targets import Arithmetic, Target, target, tile_bytes, tile_size
from lightning_distill.modes import run_batch
from lightning_distill.quantization import QuantizedLayer, full_precision

Run = Callable[[nn.Module, Any], Any]
SHOWN = 8
"""Layers that a row names at most."""


@dataclass(frozen=True)
class DeploymentRow:
    """One thing that was looked at.

    Attributes:
        item: What.
        passed: Whether it suits the target; ``None`` where that cannot be said, or is no question.
        detail: What was found, and what to do.
        layers: Names of the layers that do not suit.
    """

    item: str
    passed: bool | None
    detail: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class DeploymentReport:
    """What a network has to do with a target; ``str(report)`` is a table.

    Attributes:
        target: Name of the machine.
        rows: What was looked at.
    """

    target: str
    rows: tuple[DeploymentRow, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing was found that does not suit the target."""
        return all(row.passed is not False for row in self.rows)

    def __getitem__(self, item: str) -> DeploymentRow:
        """The row of that name."""
        return {row.item: row for row in self.rows}[item]

    def __str__(self) -> str:
        width = max(len(row.item) for row in self.rows)
        mark = {True: "ok", False: "FAILS", None: "note"}
        rows = [f"{row.item:{width}}  {mark[row.passed]:5}  {row.detail}" for row in self.rows]
        failed = sum(row.passed is False for row in self.rows)
        end = "nothing found that does not suit it" if self.passed else f"{failed} of {len(self.rows)} rows fail"
        return "\n".join([*rows, f"{self.target}: {end}"])


def deployment_check(
    network: nn.Module,
    batch: Any,
    target_machine: str | Target,
    *,
    run: Run | None = None,
    batch_sizes: Sequence[int] = (),
) -> DeploymentReport:
    """Hold a network against what a machine computes well.

    Rows: ``"formats"`` (has the target arithmetic for the quantized layers), ``"float layers"`` (what is not computed
    with whole numbers), ``"channels"`` (whole vectors; what data and classes fix is left out), ``"batch norm"`` (can
    every one be folded into the layer before), ``"memory"`` (weights without gaps, from the right address on),
    ``"tiles"`` (for the first cache) and, with ``batch_sizes``, ``"batches"``, measured in floating point here.

    Args:
        network: Any network, float or quantized; it is left as it was.
        batch: What it reads.
        target_machine: A name of :data:`~lightning_distill.hardware.TARGETS`, or a target of your own.
        run: See :func:`~lightning_distill.hardware.count_costs`.
        batch_sizes: For which the samples per second are measured.

    Raises:
        ValueError: If the target is unknown, a batch size is not positive, or no linear layer or convolution was run.
    """
    machine = target(target_machine)
    if wrong := [size for size in batch_sizes if size < 1]:
        raise ValueError(f"`batch_sizes` must be positive, got {wrong[0]}.")
    followed = Followed(network)
    try:
        costs = count_costs(network, batch, run=run)
    finally:
        seen = followed.finish()
    modules = dict(network.named_modules())
    layers = {cost.name: modules[cost.name] for cost in costs if isinstance(modules.get(cost.name), PRODUCTS)}
    if not layers:
        raise ValueError(f"{type(network).__name__} ran no linear layer and no convolution to check.")
    used = {name: _arithmetic(layer, machine) for name, layer in layers.items()}
    rows = [
        _formats(layers, used, machine),
        _float_layers(layers, used),
        _channels(layers, used, machine),
        _batch_norms(find_fusions(network) or seen, layers),
        _memory(layers, machine),
        _tiles(used, machine),
    ]
    if batch_sizes:
        rows.append(_batches(network, batch, batch_sizes, run))
    return DeploymentReport(machine.name, tuple(rows))


def _arithmetic(layer: nn.Module, machine: Target) -> Arithmetic:
    """What the target computes a layer with."""
    if isinstance(layer, QuantizedLayer) and layer.weight_bits <= 8 and layer.activation_bits is not None:
        whole = machine.computes(max(layer.weight_bits, layer.activation_bits), integer=True)
        if whole is not None and layer.spec.granularity in machine.granularities:
            return whole
    weight: Any = layer.weight
    found = machine.computes(min(8 * weight.element_size(), 32), integer=False)
    assert found is not None  # every target has float32
    return found


def _formats(layers: dict[str, nn.Module], used: dict[str, Arithmetic], machine: Target) -> DeploymentRow:
    quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLayer)}
    if not quantized:
        best = machine.computes(8, integer=True)
        gain = f" (the target has {best})" if best else ""
        return DeploymentRow("formats", None, f"nothing is quantized{gain}")
    reasons: dict[str, list[str]] = {}
    for name, layer in quantized.items():
        if not used[name].integer:
            reasons.setdefault(_why_float(layer, machine), []).append(name)
    if reasons:
        said = "; ".join(f"{_names(names)}: {reason}" for reason, names in reasons.items())
        return DeploymentRow("formats", False, said, tuple(name for name in quantized if not used[name].integer))
    widened = [name for name, layer in quantized.items() if layer.weight_bits < used[name].bits]
    note = f"; fewer bits are widened, no faster than int8: {_names(widened)}" if widened else ""
    kinds = ", ".join(dict.fromkeys(str(used[name]) for name in quantized))
    return DeploymentRow("formats", True, f"{kinds}{note}")


def _why_float(layer: QuantizedLayer, machine: Target) -> str:
    if layer.weight_bits > 8:
        return f"{layer.weight_bits} bits are floating point"
    if layer.activation_bits is None:
        return "inputs are not quantized, so it computes in floating point: `QuantSpec(…, activations=8)`"
    if layer.spec.granularity not in machine.granularities:
        return f"steps per {layer.spec.granularity!r}, but integer kernels take {' or '.join(machine.granularities)}"
    return f"no whole numbers of {max(layer.weight_bits, layer.activation_bits)} bits"


def _float_layers(layers: dict[str, nn.Module], used: dict[str, Arithmetic]) -> DeploymentRow:
    names = tuple(name for name in layers if not used[name].integer)
    if not names:
        return DeploymentRow("float layers", True, "none of the linear layers and convolutions")
    quantized = any(isinstance(layer, QuantizedLayer) for layer in layers.values())
    detail = _names(names) if quantized else f"all {len(names)} linear layers and convolutions"
    return DeploymentRow("float layers", None, f"{detail}, {used[names[0]]}", names)


def _channels(layers: dict[str, nn.Module], used: dict[str, Arithmetic], machine: Target) -> DeploymentRow:
    wrong: dict[str, str] = {}
    first, last = next(iter(layers)), next(reversed(layers))
    for name, layer in layers.items():
        multiple = used[name].multiple
        reads, makes = _sizes(layer)
        found = []
        if name != first and not is_aligned(reads, multiple):
            found.append(f"reads {reads} (take {align_channels(reads, multiple, mode='nearest')})")
        if name != last and not is_aligned(makes, multiple):
            found.append(f"makes {makes} (take {align_channels(makes, multiple, mode='nearest')})")
        if found:
            wrong[name] = f"{name} {' and '.join(found)}"
    multiples = " or ".join(map(str, sorted({one.multiple for one in used.values()})))
    if wrong:
        detail = f"no multiples of {multiples}: {_names(list(wrong.values()))}"
        return DeploymentRow("channels", False, detail, tuple(wrong))
    return DeploymentRow("channels", True, f"multiples of {multiples} (but for data and classes)")


def _sizes(layer: Any) -> tuple[int, int]:
    """Channels that are read and made, of a group; of a depthwise convolution all."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if layer.groups == layer.in_channels == layer.out_channels:
        return layer.in_channels, layer.out_channels
    return layer.in_channels // layer.groups, layer.out_channels // layer.groups


def _batch_norms(found: Fusion, layers: dict[str, nn.Module]) -> DeploymentRow:
    seen = "" if found.known else "; the network cannot be traced, so uses of an output outside of layers are not seen"
    if not found.pairs and not found.rest:
        return DeploymentRow("batch norm", True, "none left")
    if found.rest:
        detail = f"cannot be folded into a layer before: {_names(found.rest)}{seen}"
        return DeploymentRow("batch norm", False if found.known else None, detail, found.rest)
    quantized = any(isinstance(layer, QuantizedLayer) for layer in layers.values())
    how = "export_onnx does it" if quantized else "fold_batch_norms does it, and runtimes do"
    relu = f", {len(found.relu)} with a ReLU behind" if found.relu else ""
    return DeploymentRow(
        "batch norm",
        True if found.known else None,
        f"all {len(found.pairs)} can be folded into the layer before{relu}: {how}{seen}",
    )


def _memory(layers: dict[str, nn.Module], machine: Target) -> DeploymentRow:
    gaps, shifted, other = [], [], []
    for name, layer in layers.items():
        weight: Any = layer.weight
        last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        if not weight.is_contiguous() and not last:
            gaps.append(name)
        if weight.data_ptr() % machine.alignment:
            shifted.append(name)
        if weight.ndim == 4 and machine.layout == "channels_last" and not last:
            other.append(name)
    said = []
    if gaps:
        said.append(f"weights with gaps: {_names(gaps)} (`weight.data = weight.data.contiguous()`)")
    if shifted:
        said.append(f"weights that do not begin at a multiple of {machine.alignment} bytes: {_names(shifted)}")
    if said:
        return DeploymentRow("memory", False, "; ".join(said), tuple(dict.fromkeys([*gaps, *shifted])))
    note = "; kernels like `network.to(memory_format=torch.channels_last)`" if other else ""
    return DeploymentRow("memory", True, f"weights without gaps, at multiples of {machine.alignment} bytes{note}")


def _tiles(used: dict[str, Arithmetic], machine: Target) -> DeploymentRow:
    said = []
    for one in dict.fromkeys(used.values()):
        side = tile_size(machine.l1_bytes, bits=one.bits, accumulator=one.accumulator, multiple=one.multiple)
        size = tile_bytes(side, bits=one.bits, accumulator=one.accumulator)
        kind = "int" if one.integer else "float"
        said.append(f"{kind}{one.bits}: up to {side}x{side}, {size:,} of {machine.l1_bytes:,} bytes of L1")
    return DeploymentRow("tiles", None, "; ".join(said))


def _batches(network: nn.Module, batch: Any, sizes: Sequence[int], run: Run | None) -> DeploymentRow:
    """Samples per second, here."""
    batch = dict(batch) if isinstance(batch, Mapping) else batch  # of which torch knows how to take the parts
    rows = next(len(value) for value in tree_leaves(batch) if isinstance(value, Tensor))

    def part(size: int) -> Any:
        place = torch.arange(size) % rows

        def take(value: Any) -> Any:
            batched = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows
            return value[place.to(value.device)] if batched else value

        return tree_map(take, batch)

    said = []
    with full_precision(network):  # fake quantization is slower than either, and may not know its ranges yet
        for size in sizes:
            reads = _Reads(network, part(size), run)
            said.append(f"{size}: {size / measure_latency(reads, torch.zeros(())):,.0f}/s")
    here = f"{platform.machine()}, {torch.get_num_threads()} threads, PyTorch in floating point"
    return DeploymentRow("batches", None, f"measured on this machine ({here}), not on the target: {', '.join(said)}")


class _Reads(nn.Module):
    """Lets a network read a batch, whatever it is called with."""

    def __init__(self, network: nn.Module, batch: Any, run: Run | None) -> None:
        super().__init__()
        self.network = network
        self._batch = batch
        self._run = run

    def forward(self, _: Tensor) -> Any:
        if self._run is not None:
            return self._run(self.network, self._batch)
        return run_batch(self.network, self._batch)


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
