"""How much of the true front of bits and divergence a bit search finds, with all plans of a small network as judge.

    python scripts/benchmark_bit_search.py --seeds 3 --out runs/bit_search.json

A convolutional network with seven layers is trained on the 8x8 digits. All 4 ** 7 plans of 2, 4, 8 and 16 bits are
tried on the same samples that the searches look at. Reported is the hypervolume in the plane of size and square root of
the divergence, relative to that of the true front. Then plans by layer are held against plans by channel: divergence on
these samples, and accuracy on the test images, without any training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path
from statistics import stdev
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_distill import KD
from lightning_distill.bit_search import (
    PlanLoss,
    RoundedWeights,
    Trials,
    budgets_between,
    evolve,
    fisher_errors,
    greedy,
    hypervolume,
    layer_errors,
    pareto_front,
    search_bits,
    squared_errors,
    try_allocations,
)
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.tasks import Classification

BITS = (2, 4, 8, 16)
CHANNEL_BITS = (2, 3, 4, 6, 8)
MEANS = (2.25, 2.5, 3.0, 4.0)
Batches = list[tuple[torch.Tensor, ...]]
WIDTHS = (12, 16, 16, 24, 24, 32)


def build() -> nn.Module:
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(itertools.pairwise((1, *WIDTHS))):
        layers += [nn.Conv2d(before, after, 3, padding=1, stride=2 if number in (2, 4) else 1)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * WIDTHS[-1], 10))


def train(seed: int) -> tuple[nn.Module, Batches, float, tuple[torch.Tensor, ...]]:
    """The network, 200 validation images, its test accuracy, the test data."""
    L.seed_everything(seed, verbose=False)
    datamodule = DigitsDataModule(batch_size=64, seed=seed)
    module = KD(build(), alpha=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=8, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)
    accuracy = trainer.test(module, datamodule=datamodule, verbose=False)[0]["test/accuracy"]
    images = datamodule.splits.validation[0][:200]
    return module.export(), [(images,)], accuracy, datamodule.splits.test


def by_granularity(network: nn.Module, batches: Batches, test: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Divergence and test accuracy of plans by layer and by channel, for several budgets."""
    rounded, rows = RoundedWeights(network, CHANNEL_BITS), {}
    for bits in MEANS:
        for granularity in ("layer", "channel"):
            found = search_bits(
                network, batches, effective_bits=bits, bits=CHANNEL_BITS, granularity=granularity, points=0
            )
            with rounded.applied(found.plan), torch.no_grad():
                correct = float((network(test[0]).argmax(dim=1) == test[1]).float().mean())
            rows[f"{bits:g} bits, by {granularity}"] = {"divergence": found.loss, "accuracy": correct}
    return rows


def compare(seed: int) -> dict[str, Any]:
    network, batches, accuracy, test = train(seed)
    rounded = RoundedWeights(network, BITS)
    loss = PlanLoss(network, rounded, batches, Classification())
    start = time.process_time()
    every = Trials(loss, rounded.costs)
    for bits in itertools.product(BITS, repeat=len(rounded.sizes)):
        every(dict(zip(rounded.sizes, bits, strict=True)))
    seconds = time.process_time() - start
    worst = [
        1.05 * math.sqrt(max(trial.loss for trial in every.done)),
        1.05 * max(trial.cost for trial in every.done),
    ]

    def volume(trials: Trials) -> float:
        return hypervolume([(math.sqrt(max(t.loss, 0.0)), t.cost) for t in trials.done], worst)

    true = volume(every)
    rows: dict[str, dict[str, float]] = {}

    def report(name: str, trials: Trials) -> None:
        rows[name] = {"evaluations": len(trials), "share": volume(trials) / true}

    def fresh() -> Trials:  # a plan that was tried is looked up
        return Trials(lambda plan: every(plan).loss, rounded.costs)

    trials = fresh()
    for choice in BITS:
        trials(dict.fromkeys(rounded.sizes, choice))
    report("uniform bits", trials)
    budgets = budgets_between(rounded.costs, 14)
    for name, errors in {
        "squared weight error + MILP": squared_errors(rounded),
        "Fisher + MILP": fisher_errors(network, rounded, batches, Classification(), samples=64),
    }.items():
        try_allocations(trials := fresh(), errors, budgets)
        report(name, trials)
    trials = fresh()
    try_allocations(trials, layer_errors(trials), budgets[1:])  # the cheapest plan needs no search
    report("KL + MILP", trials)
    start_plans = [trial.plan for trial in trials.front()]
    evolve(trials, 85, start=start_plans, seed=seed)
    report("KL + MILP, then NSGA-II", trials)
    greedy(trials := fresh())
    report("greedy", trials)
    for number in (35, 100):
        evolve(trials := fresh(), number, seed=seed)
        report(f"NSGA-II, {number}", trials)
        draw = random.Random(seed)
        trials = fresh()
        while len(trials) < number:
            trials({layer: draw.choice(BITS) for layer in rounded.sizes})
        report(f"random, {number}", trials)
    front = pareto_front([(trial.loss, trial.cost) for trial in every.done])
    return {
        "seed": seed, "accuracy": accuracy, "parameters": sum(rounded.sizes.values()), "plans": len(every),
        "front": len(front), "seconds": seconds, "methods": rows,
        "granularity": by_granularity(network, batches, test),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/bit_search.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        found.append(compare(seed))
        print(json.dumps(found[-1]), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1))
    print(f"{'method':28}  evaluations  share of the true front's hypervolume, mean (lowest) of {len(found)} seeds")
    for name in found[0]["methods"]:
        rows = [result["methods"][name] for result in found]
        shares = [row["share"] for row in rows]
        count = sum(row["evaluations"] for row in rows) / len(rows)
        print(f"{name:28}  {count:11.0f}  {sum(shares) / len(shares):.3f} ({min(shares):.3f})")

    print("without training                divergence    test accuracy, mean and standard deviation")
    for name in found[0]["granularity"]:
        losses = [result["granularity"][name]["divergence"] for result in found]
        right = [100 * result["granularity"][name]["accuracy"] for result in found]
        spread = stdev(right) if len(right) > 1 else 0.0
        print(f"{name:28}  {sum(losses) / len(losses):12.4f}  {sum(right) / len(right):8.2f} ± {spread:.2f}")


if __name__ == "__main__":
    main()
