"""The result of a search: a plan, what it costs, and what else was tried."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_distill.bit_search.budgets import Unit
from lightning_distill.bit_search.pareto import pareto_front
from lightning_distill.bit_search.rounding import effective_bits
from lightning_distill.bit_search.trials import Trial
from lightning_distill.quantization.spec import Bits, mean_bits


@dataclass(frozen=True)
class BitSearchResult:
    """What a search found.

    Attributes:
        plan: Bits by layer; one number, or one for each output channel.
        loss: Divergence of the network with this plan from itself.
        budget: What was allowed: bits per weight in the mean, or seconds or joules of the whole network.
        sizes: Elements of each layer's weight.
        errors: What each layer alone does at each number of bits.
        trials: All plans with one number of bits per layer that were tried; their costs are those of the searched
            layers.
        unit: Of costs: ``"bits"`` of storage, or ``"seconds"`` or ``"joules"`` for a batch, as a cost model says.
        rest: Cost of what was not searched.
    """

    plan: dict[str, Bits]
    loss: float
    budget: float
    sizes: dict[str, int]
    errors: dict[str, dict[int, float]]
    trials: Sequence[Trial]
    unit: Unit = "bits"
    rest: float = 0.0

    @property
    def effective_bits(self) -> float:
        """Mean number of bits per weight of the plan."""
        return effective_bits(self.plan, self.sizes)

    @property
    def bytes(self) -> int:
        """Storage of the planned weights, without steps, rounded up."""
        return math.ceil(self.effective_bits * sum(self.sizes.values()) / 8 - 1e-6)

    @property
    def cost(self) -> float:
        """Of the plan, to be compared with ``budget``."""
        if self.unit == "bits":
            return self.effective_bits
        return self.in_all(next(trial.cost for trial in self.trials if trial.plan == self.plan))

    def in_all(self, cost: float) -> float:
        """The cost of a trial, to be compared with ``budget``."""
        return cost / sum(self.sizes.values()) if self.unit == "bits" else cost + self.rest

    def front(self) -> list[Trial]:
        """Trials that no other beats in both loss and cost, by rising cost."""
        best = [self.trials[i] for i in pareto_front([(trial.loss, trial.cost) for trial in self.trials])]
        return sorted(best, key=lambda trial: (trial.cost, trial.loss))

    def __str__(self) -> str:
        """A table of the layers, and one line on the whole."""
        width = max(len("layer"), *map(len, self.plan))
        choices = sorted({bits for row in self.errors.values() for bits in row})
        lines = [f"{'layer':<{width}}  {'weights':>9}  bits  " + "  ".join(f"{f'at {b} bits':>11}" for b in choices)]
        for layer, bits in self.plan.items():
            row = "  ".join(f"{self.errors[layer].get(b, float('nan')):>11.3g}" for b in choices)
            lines.append(f"{layer:<{width}}  {self.sizes[layer]:>9}  {mean_bits(bits):>4.3g}  {row}{_spread(bits)}")
        spent = f"{self.effective_bits:.3f} bits per weight"
        if self.unit == "bits":
            spent += f" (budget {self.budget:g})"
        else:
            spent = f"{self.cost:.4g} {self.unit} (budget {self.budget:g}), {spent}"
        lines.append(f"{spent}, {self.bytes} bytes, divergence {self.loss:.4g}, {len(self.trials)} plans tried")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, names and lists."""
        return asdict(self) | {"trials": [asdict(trial) for trial in self.trials]}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> BitSearchResult:
        """Put :meth:`as_dict` together again, also after a way through JSON."""
        errors = {layer: {int(bits): value for bits, value in row.items()} for layer, row in state["errors"].items()}
        plan = {layer: tuple(bits) if isinstance(bits, list) else bits for layer, bits in state["plan"].items()}
        return cls(**{**state, "plan": plan, "errors": errors, "trials": [Trial(**trial) for trial in state["trials"]]})

    def write(self, folder: str | Path) -> None:
        """Write ``bits.json`` and ``bits.png`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".bits.json.tmp"
        temporary.write_text(json.dumps(self.as_dict(), indent=1))
        temporary.replace(folder / "bits.json")
        self.plot(folder / "bits.png")

    def plot(self, path: str | Path) -> None:
        """Draw the front and the plan into a PNG file."""
        from lightning_distill.bit_search.plot import plot_search

        plot_search(self, path)


def _spread(bits: Bits) -> str:
    """How many channels have how many bits, where they differ."""
    if isinstance(bits, int):
        return ""
    return "  channels: " + ", ".join(f"{bits.count(choice)} at {choice}" for choice in sorted(set(bits)))


__all__ = ["BitSearchResult"]
