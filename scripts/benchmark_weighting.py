"""What balancing the loss terms costs: callbacks side by side with constant weights, in one run.

Rules: main-process CPU time; variants in random order over several rounds, medians reported; constant weights run
twice, and the difference between the two is the noise floor; every variant must compute the same losses of the terms
in the first step before anything is timed. A transformer's step shows the ratio, a tiny step the absolute overhead.

    python scripts/benchmark_weighting.py
    python scripts/benchmark_weighting.py --rounds 9 --work transformer
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import rich
import torch
from rich.table import Table
from torch import Tensor

from lightning_distill import KD, SequenceClassification
from lightning_distill.callbacks import (
    MGDA,
    BalancedMagnitudes,
    CAGrad,
    GradientLog,
    GradNorm,
    PCGrad,
    UncertaintyWeighting,
    WeightReport,
)
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.losses import FeatureMatching
from lightning_distill.networks import MLP, from_config

VARIANTS: dict[str, Callable[[], list[L.Callback]]] = {
    "constant weights": list,
    "constant weights again (noise floor)": list,
    "UncertaintyWeighting": lambda: [UncertaintyWeighting()],
    "GradNorm, every 10 steps": lambda: [GradNorm()],
    "GradNorm, every step": lambda: [GradNorm(every_n_steps=1)],
    "MGDA in a representation": lambda: [MGDA()],
    "MGDA, exact": lambda: [MGDA(exact=True)],
    "PCGrad in a representation": lambda: [PCGrad()],
    "CAGrad in a representation": lambda: [CAGrad()],
    "BalancedMagnitudes": lambda: [BalancedMagnitudes()],
    "GradientLog, every 50 steps": lambda: [GradientLog()],
    "WeightReport, every 50 steps": lambda: [WeightReport()],
}


class FirstLosses(L.Callback):
    """Remembers the losses of the terms in the first step."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not self.values and isinstance(pl_module, KD) and pl_module.live is not None:
            self.values = {name: value.item() for name, value in pl_module.live.losses.items()}


class Loader:
    """Ready batches."""

    def __init__(self, batches: list[Any], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % len(self.batches)] for i in range(self.steps))

    def __len__(self) -> int:
        return self.steps


@dataclass(frozen=True)
class Work:
    """A module, its batches, and two lengths of training whose difference is timed."""

    build: Callable[[], KD]
    batches: Callable[[], list[Any]]
    short: int
    long: int
    variants: tuple[str, ...] = tuple(VARIANTS)


def bert() -> torch.nn.Module:
    size = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return from_config("bert", "sequence-classification", {"vocab_size": 2000, "num_labels": 10} | size | dropout)


def texts() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "input_ids": torch.randint(1, 2000, (16, 64), generator=generator),
            "attention_mask": torch.ones(16, 64, dtype=torch.long),
            "labels": torch.randint(0, 10, (16,), generator=generator),
        }
        for _ in range(4)
    ]


def transformer_module(layer: int) -> KD:
    torch.manual_seed(0)
    feature = FeatureMatching({f"hidden_states.{layer}": f"hidden_states.{layer}"})
    optimizer = partial(torch.optim.AdamW, lr=1e-4)
    return KD(bert(), bert(), terms={"feature": feature}, task=SequenceClassification(), optimizer=optimizer)


def tiny_module() -> KD:
    torch.manual_seed(0)
    feature = FeatureMatching({"blocks": "blocks"})
    optimizer = partial(torch.optim.SGD, lr=0.01)
    return KD(MLP([64, 32, 10]), MLP([64, 128, 10]), terms={"feature": feature}, optimizer=optimizer)


def points() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(64, 64, generator=generator), torch.randint(0, 10, (64,), generator=generator)] for _ in range(8)
    ]


MAIN = tuple(name for name in VARIANTS if name.split(",")[0].split()[0] not in ("CAGrad", "WeightReport"))
FEW = (*list(VARIANTS)[:2], "GradNorm, every 10 steps", "MGDA in a representation")
WORKS = {
    "transformer, features of the last of 4 layers": Work(partial(transformer_module, 4), texts, 10, 30, MAIN),
    "transformer, features of the second of 4 layers": Work(partial(transformer_module, 2), texts, 10, 30, FEW),
    "tiny": Work(tiny_module, points, short=100, long=500),
}


def fit(work: Work, callbacks: list[L.Callback], steps: int) -> dict[str, float]:
    module, first = work.build(), FirstLosses()
    batches = work.batches()
    module.build(batches[0])
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            callbacks=[*callbacks, first],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, Loader(batches, steps))
    return first.values


def measure(work: Work, rounds: int) -> dict[str, list[float]]:
    """CPU seconds per step of each variant and round, start-up subtracted by comparing two lengths."""
    expected = fit(work, [], 1)
    for name in work.variants:
        found = fit(work, VARIANTS[name](), 1)
        if any(abs(found[term] - value) > 1e-4 for term, value in expected.items()):
            raise SystemExit(f"{name} computes other losses than {expected}: {found}")
    seconds: dict[str, list[float]] = {name: [] for name in work.variants}
    order = [(name, VARIANTS[name]) for name in work.variants]
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for name, build in order:
            spent = []
            for steps in (work.short, work.long):
                begin = time.process_time()
                fit(work, build(), steps)
                spent.append(time.process_time() - begin)
            seconds[name].append((spent[1] - spent[0]) / (work.long - work.short))
    return seconds


def show(name: str, seconds: dict[str, list[float]]) -> None:
    medians = {variant: statistics.median(values) for variant, values in seconds.items()}
    base = medians["constant weights"]
    table = Table("variant", "ms / step", "µs more", "ratio", "smallest, largest", title=f"{name}: three terms")
    for variant, value in medians.items():
        ends = f"{min(seconds[variant]) * 1e3:.3f}, {max(seconds[variant]) * 1e3:.3f}"
        table.add_row(variant, f"{value * 1e3:.3f}", f"{(value - base) * 1e6:+.0f}", f"{value / base:.3f}", ends)
    rich.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", choices=["transformer", "tiny", "all"], default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*The number of training batches")
    with quiet_lightning():
        for name, work in WORKS.items():
            if options.work in (name.split(",")[0], "all"):
                show(name, measure(work, options.rounds))
    print(f"torch {version('torch')}, lightning {version('lightning')}, one thread")


if __name__ == "__main__":
    main()
