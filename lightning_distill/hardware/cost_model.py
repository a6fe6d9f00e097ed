"""Latency, energy and size of a network from counted operations and bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lightning_distill.files import read_json, write_json
from lightning_distill.hardware.counting import LayerCost, alone, count_costs, stored_bytes
from lightning_distill.hardware.energy import DRAM_NANOJOULES, PICOJOULES, energy
from lightning_distill.hardware.kernels import RUNTIMES, Kernel, Runtime, floating, kernel_use
from lightning_distill.hardware.operations import Operation


@dataclass(frozen=True)
class LayerEstimate:
    """A layer's counts, and what they cost: seconds and joules for one batch."""

    cost: LayerCost
    latency: float
    energy: float


@dataclass(frozen=True)
class CostReport:
    """What a network costs for one batch; ``str(report)`` is a table.

    Attributes:
        layers: In the order of the first use.
        size: Bytes of the stored network.
        model: Name of the cost model.
        start: Seconds that the runtime takes for a batch whatever the layers are.
    """

    layers: tuple[LayerEstimate, ...]
    size: int
    model: str
    start: float = 0.0

    @property
    def latency(self) -> float:
        """Seconds of all layers, one after the other, and of the start."""
        return math.fsum((self.start, *(layer.latency for layer in self.layers)))

    @property
    def energy(self) -> float:
        """Joules of all layers."""
        return math.fsum(layer.energy for layer in self.layers)

    @property
    def flops(self) -> int:
        """Multiplications and additions of all layers."""
        return sum(layer.cost.flops for layer in self.layers)

    @property
    def bytes(self) -> float:
        """Bytes that all layers read and write."""
        return math.fsum(layer.cost.bytes for layer in self.layers)

    def __str__(self) -> str:
        width = max([len("start"), *(len(layer.cost.name) for layer in self.layers)])
        head = f"{'layer':{width}}  {'kind':<18} bits       MFLOP       kB moved          µs        µJ"
        rows = [
            f"{layer.cost.name:{width}}  {layer.cost.kind[:18]:<18} {layer.cost.weight_bits:>4} "
            f"{_row(layer.cost.flops, layer.cost.bytes, layer.latency, layer.energy)}"
            for layer in self.layers
        ]
        if self.start:
            rows.append(f"{'start':{width}}  {'':<18} {'':>4} {_row(0, 0, self.start, 0)}")
        total = f"{'all':{width}}  {'':<18} {'':>4} {_row(self.flops, self.bytes, self.latency, self.energy)}"
        return "\n".join([head, *rows, total, f"{self.size:,} bytes stored; cost model: {self.model}"])


@dataclass(frozen=True)
class CostModel:
    """Seconds of a layer: ``calls * overhead + flops / throughput + bytes / bandwidth``.

    A convolution has a throughput of its own, and its channels count in whole blocks of 16. The three are added: they
    overlap on real machines, but a sum is what fits measurements of small networks, and it never becomes negative.

    A calibration also has ``kernels``: constants for each kind of operation and, of ONNX Runtime, each width of its
    arithmetic. An operation whose kernel was measured takes what that says. Where only the same kernel in floating
    point was measured, that one counts; without any, the formula above does.

    Args:
        overhead: Seconds to start one operation, at least 0.
        throughput: Operations per second in float32, two per MAC, positive; infinity if arithmetic costs nothing.
        convolution_throughput: The same of convolutions, of their ``padded_flops``; ``None``: a convolution counts as a
            product of matrices.
        bandwidth: Bytes per second, positive; infinity if moving costs nothing.
        speedups: Factor on ``throughput`` by width of the arithmetic. A width that is missing counts as 1: most
            machines compute with weights of 4 bits as with those of 32.
        picojoules: Energy of a MAC by width of the arithmetic; a width that is missing counts as the next wider one.
            The defaults are published figures of 45 nm; nothing of energy is measured here.
        access_nanojoules: Energy of one access of 8 bytes to DRAM.
        name: What a report calls it.
        kernels: By their names, see :func:`~lightning_distill.hardware.kernel_use`.
        runtime: Whose kernels they are: ``"torch"`` (eager mode) or ``"onnx"`` (ONNX Runtime).
        start: Seconds of a network's run that no layer takes, at least 0.

    Raises:
        ValueError: If a number is outside its range, ``picojoules`` is empty or the runtime unknown.

    Example:
        >>> model = CostModel(overhead=1e-6, throughput=1e9, bandwidth=1e9)
        >>> round(model.latency(LayerCost("0", "Linear", calls=2, flops=3000, activation_bytes=5000.0)), 9)
        1e-05
    """

    overhead: float = 0.0
    throughput: float = math.inf
    convolution_throughput: float | None = None
    bandwidth: float = math.inf
    speedups: Mapping[int, float] = field(default_factory=dict)
    picojoules: Mapping[int, float] = field(default_factory=lambda: dict(PICOJOULES))
    access_nanojoules: float = DRAM_NANOJOULES
    name: str = "custom"
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    runtime: Runtime = "torch"
    start: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {"overhead": self.overhead, "start": self.start}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be finite and at least 0, got {value}.")
        rates = {"throughput": self.throughput, "bandwidth": self.bandwidth}
        if self.convolution_throughput is not None:
            rates["convolution_throughput"] = self.convolution_throughput
        rates |= {f"speedups[{bits}]": factor for bits, factor in self.speedups.items()}
        for name, value in rates.items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not self.picojoules:
            raise ValueError("`picojoules` must have at least one width, got none.")
        if self.runtime not in RUNTIMES:
            raise ValueError(f"`runtime` must be one of {list(RUNTIMES)}, got {self.runtime!r}.")

    def latency(self, cost: LayerCost) -> float:
        """Seconds of one layer."""
        if not self.kernels or not cost.operations:
            return self._counted(cost)
        return math.fsum(self._operation(operation, cost) for operation in cost.operations)

    def _operation(self, operation: Operation, cost: LayerCost) -> float:
        use = kernel_use(operation, cost, self.runtime)
        if kernel := self.kernels.get(use.kernel) or self.kernels.get(floating(use.kernel)):
            return kernel.latency(use)
        return self._counted(alone(operation, cost))

    def _counted(self, cost: LayerCost) -> float:
        """By the constants for all kinds of operations."""
        if self.convolution_throughput is None:
            arithmetic = cost.flops / self.throughput
        else:
            products = cost.flops - cost.convolution_flops
            arithmetic = products / self.throughput + cost.padded_flops / self.convolution_throughput
        arithmetic /= self.speedups.get(cost.compute_bits, 1.0)
        return cost.calls * self.overhead + arithmetic + cost.bytes / self.bandwidth

    def energy(self, cost: LayerCost) -> float:
        """Joules of one layer; every byte counts as moved to or from DRAM, so this is an upper bound."""
        wider = [bits for bits in self.picojoules if bits >= cost.compute_bits]
        each = self.picojoules[min(wider) if wider else max(self.picojoules)]
        moved = math.ceil(cost.bytes)
        return energy(cost.flops / 2, each, bytes_moved=moved, access_nanojoules=self.access_nanojoules).total

    def estimate(
        self, model: nn.Module, batch: Any, *, run: Callable[[nn.Module, Any], Any] | None = None
    ) -> CostReport:
        """Latency, energy and size of ``model`` for one batch; arguments as of :func:`count_costs`."""
        return self.report(count_costs(model, batch, run=run), size=stored_bytes(model))

    def report(self, costs: Sequence[LayerCost], *, size: int) -> CostReport:
        """The same from counts that are there already."""
        layers = tuple(LayerEstimate(cost, self.latency(cost), self.energy(cost)) for cost in costs)
        return CostReport(layers, size, self.name, self.start)

    def save(self, path: str | Path) -> None:
        """Write it as JSON; what is infinite, as by default, is left out."""
        values = {name: value for name, value in asdict(self).items() if value not in (math.inf, None)}
        values["kernels"] = {name: kernel.as_dict() for name, kernel in self.kernels.items()}
        write_json(Path(path), values)

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """What :meth:`save` has written.

        Raises:
            FileNotFoundError: If there is nothing at ``path``.
            ValueError: If it is no cost model.
        """
        values = read_json(Path(path))
        expected = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or not {"name", "speedups", "picojoules"} <= set(values) <= expected:
            raise ValueError(f"{str(path)!r} is no cost model: expected the keys {sorted(expected)}.")
        for name in ("speedups", "picojoules"):
            values[name] = {int(bits): value for bits, value in values[name].items()}
        values["kernels"] = {
            name: _kernel(path, name, constants) for name, constants in values.get("kernels", {}).items()
        }
        return cls(**values)


def _kernel(path: str | Path, name: str, constants: Mapping[str, float]) -> Kernel:
    if wrong := set(constants) - set(Kernel.__dataclass_fields__):
        raise ValueError(
            f"{str(path)!r} is no cost model: the kernel {name!r} has {sorted(wrong)}, expected some of "
            f"{sorted(Kernel.__dataclass_fields__)}."
        )
    return Kernel(**constants)


_IDEAL = {bits: 32 / bits for bits in (1, 2, 4, 8, 16, 32)}
PRESETS = {
    "ideal": CostModel(throughput=1e11, bandwidth=2e10, speedups=_IDEAL, name="ideal"),
    "compute": CostModel(throughput=1e11, speedups=_IDEAL, access_nanojoules=0.0, name="compute"),
}
"""Imaginary machines of 100 GFLOP/s in float32 that are ``32 / bits`` times faster at other widths.

``"ideal"`` moves 20 GB/s; ``"compute"`` leaves memory out, of latency and of energy. They rank networks and give
bounds. They are no machine's numbers: see :func:`~lightning_distill.hardware.calibrate_cost_model` for those.
"""


def cost_model(name: str | Path | CostModel) -> CostModel:
    """A preset by its name, or the model that a JSON file holds; a cost model is returned as it is.

    Raises:
        ValueError: If there is neither.
    """
    if isinstance(name, CostModel):
        return name
    if str(name) in PRESETS:
        return PRESETS[str(name)]
    if not Path(name).is_file():
        raise ValueError(f"The cost model must be one of {sorted(PRESETS)} or a JSON file, got {str(name)!r}.")
    return CostModel.load(name)


def _row(flops: float, moved: float, latency: float, joules: float) -> str:
    return f"{flops / 1e6:>11,.3f} {moved / 1e3:>14,.1f} {latency * 1e6:>11,.1f} {joules * 1e6:>9,.1f}"
