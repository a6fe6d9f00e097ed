"""What plans cost, and how much they may: bits of storage, or what a cost model says of time and energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_distill.bit_search.allocate import Table, weight_bits
from lightning_distill.hardware import CostModel, count_costs
from lightning_distill.hardware import cost_model as find_cost_model

Unit = Literal["bits", "seconds", "joules"]
FLOAT = 32


@dataclass(frozen=True)
class Costs:
    """What the choices cost.

    Attributes:
        table: Of each searched layer with each number of bits.
        rest: Of what is not searched.
        unquantized: Of everything, with 32-bit weights in the searched layers.
        sizes: Elements of each searched layer's weight.
    """

    table: Table
    rest: float
    unquantized: float
    sizes: Mapping[str, int]


class Budget:
    """How much a plan may cost; exactly one of the four.

    Args:
        effective_bits: Largest mean number of bits per weight of the searched layers.
        max_bytes: Largest storage of their weights, steps not counted.
        max_latency: Most seconds of the whole network for one batch, by the cost model.
        max_energy: Most joules of the whole network for one batch, by the cost model.
        cost_model: A cost model, a preset or the file of one, see :func:`~lightning_distill.hardware.cost_model`; for
            the last two, and only for them.

    Raises:
        ValueError: If not exactly one is given, it is not positive, or the cost model is missing or unknown.
    """

    def __init__(
        self,
        effective_bits: float | None = None,
        max_bytes: float | None = None,
        max_latency: float | None = None,
        max_energy: float | None = None,
        cost_model: CostModel | str | Path | None = None,
    ) -> None:
        amounts = {
            "effective_bits": effective_bits,
            "max_bytes": max_bytes,
            "max_latency": max_latency,
            "max_energy": max_energy,
        }
        given = {name: value for name, value in amounts.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"Give exactly one budget of {list(amounts)}, got {given or 'none'}.")
        [(self.name, self.value)] = given.items()
        if not 0 < self.value < math.inf:
            raise ValueError(f"`{self.name}` must be positive and finite, got {self.value}.")
        self.unit: Unit = "seconds" if max_latency is not None else "joules" if max_energy is not None else "bits"
        if (cost_model is None) != (self.unit == "bits"):
            raise ValueError(
                f"`cost_model` belongs to `max_latency` and `max_energy`, got {cost_model!r} with `{self.name}`. Pass "
                "a `CostModel`, 'ideal', 'compute' or the file of a calibration there, and none elsewhere."
            )
        self.model = None if cost_model is None else find_cost_model(cost_model)

    def costs(
        self,
        network: nn.Module,
        batch: Any,
        sizes: Mapping[str, int],
        bits: Sequence[int],
        run: Callable[[nn.Module, Any], Any],
    ) -> Costs:
        """What each searched layer of ``network`` costs with each number of bits, for one ``batch``."""
        if self.model is None:
            return Costs(weight_bits(sizes, bits), 0.0, FLOAT * float(sum(sizes.values())), sizes)
        of_layer = self.model.latency if self.unit == "seconds" else self.model.energy
        found = {}
        for choice in (*bits, FLOAT):
            counts = count_costs(network, batch, run=run, bits=dict.fromkeys(sizes, choice))
            found[choice] = {cost.name: of_layer(cost) for cost in counts}
        start = self.model.start if self.unit == "seconds" else 0.0
        table = {layer: {choice: found[choice].get(layer, 0.0) for choice in bits} for layer in sizes}
        rest = math.fsum((start, *(value for name, value in found[FLOAT].items() if name not in sizes)))
        return Costs(table, rest, math.fsum((start, *found[FLOAT].values())), sizes)

    def limit(self, costs: Costs) -> float:
        """The largest sum of the table's costs.

        Raises:
            ValueError: If no plan is within the budget, or the network is without any quantization.
        """
        unit = {"effective_bits": float(sum(costs.sizes.values())), "max_bytes": 8.0}.get(self.name, 1.0)
        least = math.fsum(min(row.values()) for row in costs.table.values()) + costs.rest
        if self.value * unit < least * (1 - 1e-12):
            raise ValueError(
                f"`{self.name}` is {self.value:g}, but the cheapest plan needs {least / unit:.6g}. Raise it, or allow "
                "fewer bits."
            )
        if self.value * unit > costs.unquantized * (1 + 1e-12):
            raise ValueError(
                f"`{self.name}` is {self.value:g}, but without quantization it is {costs.unquantized / unit:.6g}: "
                "nothing needs to be saved."
            )
        return self.value * unit - costs.rest


__all__ = ["Budget", "Costs", "Unit"]
