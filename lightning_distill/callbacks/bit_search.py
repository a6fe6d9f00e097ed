"""Search the bits of each layer in the middle of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_distill.bit_search import BitSearchResult, search_bits
from lightning_distill.bit_search.budgets import Budget
from lightning_distill.bit_search.search import Granularity, Refinement, Sensitivity, check_search
from lightning_distill.hardware import CostModel
from lightning_distill.modules import DistillationModule
from lightning_distill.quantization import quantized_layers, set_bits
from lightning_distill.quantization.spec import Bits


class BitSearch(L.Callback):
    """Once, at a step of the training, choose the bits of each layer of the student within a budget.

    The weights of that step get few bits on trial, and outputs are compared on samples of the training set: no label is
    looked at, no weight, order of samples or random number of the training changes; see
    :func:`~lightning_distill.bit_search.search_bits`. Every process looks at the same samples and uses the first one's
    plan. The result is in the checkpoint: a resumed run does not search again. It is printed, and written as
    ``bits.json`` and ``bits.png``.

    Args:
        effective_bits: Largest mean number of bits per weight of the searched layers.
        max_bytes: Largest storage of their weights, steps not counted.
        max_latency: Most seconds of the whole student for a batch, by ``cost_model``.
        max_energy: Most joules of the whole student for a batch, by ``cost_model``. Exactly one of the four budgets.
        cost_model: A :class:`~lightning_distill.hardware.CostModel`, ``"ideal"``, ``"compute"`` or the file of a
            calibration (``lightning-distill cost`` writes one).
        bits: Numbers of bits to choose from.
        layers: Names of the student's layers; by default all that are quantized, or all linear, convolution and
            embedding layers.
        sensitivity: ``"kl"``, ``"fisher"`` or ``"weights"``.
        refinement: ``"neighbours"``, ``"greedy"``, ``"nsga2"`` or ``"none"``.
        granularity: ``"layer"``, or ``"channel"`` for bits of each output channel.
        points: Budgets for the front, at least 2; 0 for none.
        evaluations: Plans that ``"nsga2"`` tries.
        start_step: After how many optimizer steps; 0 is before the first.
        samples: Of the training set, positive.
        data: Batches to look at instead, such as a data loader.
        seed: Of the choice of samples, ``"fisher"`` and ``"nsga2"``.
        apply: Called with the student and the plan (bits by layer name) when it was found; it must not add or remove
            parameters. By default a quantized student (of :class:`~lightning_distill.QADModule`) gets the bits, and the
            plan for another one is only reported, for a quantization that follows.
        folder: Where to write; by default the logger's folder, or without one the Trainer's ``default_root_dir``.

    Attributes:
        result: What was found; ``None`` before.

    Raises:
        ValueError: If an argument is outside its range: a budget below the fewest bits or above 32 …; in the search, if
            there is no such layer, or the training set has no order of its own and there is no ``data``.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(
        self,
        effective_bits: float | None = None,
        max_bytes: float | None = None,
        bits: Sequence[int] = (2, 4, 8),
        layers: Sequence[str] | None = None,
        *,
        max_latency: float | None = None,
        max_energy: float | None = None,
        cost_model: CostModel | str | None = None,
        sensitivity: Sensitivity = "kl",
        refinement: Refinement = "neighbours",
        granularity: Granularity = "layer",
        points: int = 14,
        evaluations: int = 100,
        start_step: int = 0,
        samples: int = 256,
        data: Iterable[Any] | None = None,
        seed: int = 0,
        apply: Callable[[nn.Module, dict[str, Bits]], Any] | None = None,
        folder: str | None = None,
    ) -> None:
        budget = Budget(effective_bits, max_bytes, max_latency, max_energy, cost_model)
        check_search(budget, bits, sensitivity, refinement, points, granularity)
        for name, value, least in (
            ("start_step", start_step, 0),
            ("samples", samples, 1),
            ("evaluations", evaluations, 1),
        ):
            if not value >= least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
        self.settings: dict[str, Any] = {
            "effective_bits": effective_bits,
            "max_bytes": max_bytes,
            "max_latency": max_latency,
            "max_energy": max_energy,
            "cost_model": budget.model,
            "bits": tuple(bits),
            "layers": layers,
            "sensitivity": sensitivity,
            "refinement": refinement,
            "granularity": granularity,
            "points": points,
            "evaluations": evaluations,
            "seed": seed,
        }
        self.start_step = start_step
        self.samples = samples
        self.data = data
        self.seed = seed
        self.apply = apply
        self.folder = folder
        self.result: BitSearchResult | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the module."""
        if not isinstance(pl_module, DistillationModule):
            raise TypeError(
                "BitSearch searches the bits of the student of a `DistillationModule` such as `KD`, but the module is "
                f"a {type(pl_module).__name__}. For any network there is `search_bits`."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Search before the first step, if that is when."""
        self._search_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Search after this step, if that is when."""
        self._search_if_due(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The result."""
        return {"result": None if self.result is None else self.result.as_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was found."""
        found = state_dict["result"]
        self.result = None if found is None else BitSearchResult.from_dict(found)

    def _search_if_due(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.result is not None or trainer.global_step < self.start_step:
            return
        assert isinstance(pl_module, DistillationModule)
        batches = self.data
        if batches is None:
            batches = training_samples(trainer.train_dataloader, self.samples, seed=self.seed)
        on_device = [trainer.strategy.batch_to_device(batch) for batch in batches]
        with isolate_rng(), pl_module.untapped() as student:
            found = search_bits(student, on_device, task=pl_module.task, **self.settings)
        # the same everywhere but for rounding: let the first process decide
        self.result = BitSearchResult.from_dict(trainer.strategy.broadcast(found.as_dict()))
        if self.apply is not None:
            self.apply(pl_module.student, dict(self.result.plan))
        elif quantized_layers(pl_module.student):
            set_bits(pl_module.student, self.result.plan)
        rank_zero_info(f"Bits after {trainer.global_step} steps:\n{self.result}")
        if trainer.is_global_zero:
            self.result.write(Path(self.folder or trainer.log_dir or trainer.default_root_dir))


def training_samples(loader: Any, samples: int, *, seed: int = 0) -> list[Any]:
    """Batches of samples drawn from a loader's data set; the loader itself and all random numbers stay where they are.

    Args:
        loader: A ``DataLoader`` over a data set with a length.
        samples: How many, as far as there are.
        seed: Of the draw; the same samples in every process.

    Raises:
        ValueError: If the loader is something else.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "Samples can be drawn from a `DataLoader` over a data set with a length, got "
            f"{type(loader).__name__}. Pass `data`, batches to look at."
        )
    dataset: Any = loader.dataset
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(dataset), generator=generator)[:samples].sort().values.tolist()
    size = loader.batch_size or 32
    batches = []
    with isolate_rng():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            found = dataset.__getitems__(part) if hasattr(dataset, "__getitems__") else [dataset[row] for row in part]
            batches.append(loader.collate_fn(found))
    return batches


__all__ = ["BitSearch", "training_samples"]
