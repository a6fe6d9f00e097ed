"""What a student may cost: trials over it are not trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_distill.comparison import Experiment
from lightning_distill.hardware import CostModel, cost_model, stored_bytes
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.tasks import Classification


@dataclass(frozen=True)
class Limits:
    """Largest costs of a student, before it is trained.

    Args:
        bytes: Of its weights and buffers, quantized ones packed.
        latency: Seconds for ``samples`` samples, as ``cost_model`` says.
        energy: Joules for them, as ``cost_model`` says.
        samples: First ones of the training set.
        cost_model: For latency and energy: ``"ideal"``, ``"compute"`` or the file of a calibration.

    Raises:
        ValueError: If there is no limit, a number is not positive, or latency or energy have no cost model.

    Example:
        >>> Limits(bytes=20_000).excess({"bytes": 25_000})
        'bytes 25000, limit 20000'
    """

    bytes: float | None = None
    latency: float | None = None
    energy: float | None = None
    samples: int = 1
    cost_model: str | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in self._limits().items() if value is not None}
        if not given:
            raise ValueError(f"`limits` must have at least one of {list(self._limits())}.")
        for name, value in {**given, "samples": self.samples}.items():
            if not value > 0:
                raise ValueError(f"`{name}` of the limits must be positive, got {value}.")
        if self.cost_model is None and (modelled := [name for name in given if name != "bytes"]):
            raise ValueError(
                f"A limit of {modelled[0]} needs a `cost_model`: 'ideal', 'compute' or the file that "
                "`lightning-distill cost` has written."
            )
        if self.cost_model is not None:
            cost_model(self.cost_model)  # refuses what there is not

    def measure(self, experiment: Experiment) -> dict[str, float]:
        """What the experiment's student costs, of what is limited; nothing of it is changed.

        Raises:
            ValueError: If the module has no student, or there is no data module to take samples from.
        """
        module: Any = experiment.module
        student = getattr(module, "student", None)
        if not isinstance(student, nn.Module):
            raise ValueError(f"`limits` are those of a student, but {type(module).__name__} has no `student`.")
        found = {} if self.bytes is None else {"bytes": float(stored_bytes(student))}
        if self.cost_model is not None:
            model: CostModel = cost_model(self.cost_model)
            task = getattr(module, "task", None) or Classification()
            with isolate_rng():
                report = model.estimate(student, _samples(experiment.datamodule, self.samples), run=task.run)
            found |= {"latency": report.latency, "energy": report.energy}
        return found

    def excess(self, costs: dict[str, float]) -> str:
        """What is over its limit, in words; empty if nothing is."""
        over = [
            f"{name} {costs[name]:.6g}, limit {limit:.6g}"
            for name, limit in self._limits().items()
            if limit is not None and costs[name] > limit
        ]
        return "; ".join(over)

    def as_dict(self) -> dict[str, Any]:
        """Without what is not limited."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def _limits(self) -> dict[str, float | None]:
        return {"bytes": self.bytes, "latency": self.latency, "energy": self.energy}


def _samples(datamodule: L.LightningDataModule | None, count: int) -> Any:
    if datamodule is None:
        raise ValueError("`limits` of latency and energy need a data module, whose samples are counted with.")
    datamodule.prepare_data()
    datamodule.setup("fit")
    return first_samples(datamodule.train_dataloader(), count)


__all__ = ["Limits"]
