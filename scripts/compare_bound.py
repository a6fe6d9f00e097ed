"""Whether ``c1 * sqrt(d / n) + c2 * 2 ** -b`` says something about compressed networks: measured on the digits.

Per seed and number of labels one network is trained in floating point, and goes on to each number of bits with itself
as its teacher, for half as many steps. A gap is the test accuracy of the network in floating point with all labels,
minus that of a quantized one. Nothing is tuned. The constants are fitted to all seeds but one and held against the gaps
of that one, for each in turn, beside a guess that knows the numbers of labels but no formula.

    python scripts/compare_bound.py --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
from functools import partial
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from torch import nn

from lightning_distill import KD, QADModule
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.diagnostics import implied_dimension, performance_bound, recovery_bound_fit
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec

BITS = (2, 3, 4, 8)
LABELS = (50, 100, 200, 400, 800)


class Run(NamedTuple):
    """One quantized network."""

    seed: int
    labels: int
    bits: int
    gap: float


def fit(module: L.LightningModule, data: DigitsDataModule, steps: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


@torch.no_grad()
def accuracy(network: nn.Module, data: DigitsDataModule) -> float:
    network.eval()
    right = [(network(batch[0]).argmax(-1) == batch[1]).float() for batch in data.test_dataloader()]
    return torch.cat(right).mean().item()


def trained(seed: int, labels: int | None, steps: int) -> tuple[nn.Module, DigitsDataModule]:
    L.seed_everything(seed, verbose=False)
    data = DigitsDataModule(batch_size=64, seed=seed, num_labels=labels, unlabelled=False)
    network = MLP((64, 64, 10))
    fit(KD(network, alpha=1.0, optimizer=partial(torch.optim.AdamW, lr=5e-3)), data, steps)
    return network, data


def measured(seeds: int, steps: int) -> list[Run]:
    runs = []
    for seed in range(seeds):
        whole, data = trained(seed, None, steps)
        best = accuracy(whole, data)
        for labels in LABELS:
            network, data = trained(seed, labels, steps)
            for bits in BITS:
                L.seed_everything(seed, verbose=False)
                spec = QuantSpec(bits, activations=8)
                optimizer = partial(torch.optim.AdamW, lr=2e-3)
                student = QADModule(copy.deepcopy(network), spec=spec, optimizer=optimizer)
                fit(student, data, steps // 2)
                runs.append(Run(seed, labels, bits, best - accuracy(student.student, data)))
    return runs


def errors_of_left_out(runs: list[Run]) -> tuple[float, float]:
    """Mean absolute error, in accuracy, on a seed that was left out: of the formula, and of the mean for each ``n``."""
    formula, means = [], []
    for seed in {run.seed for run in runs}:
        known = [run for run in runs if run.seed != seed]
        found = recovery_bound_fit(*zip(*((r.gap, r.bits, r.labels) for r in known), strict=True))
        rate = 0.0 if math.isnan(found.c.value) else found.c.value
        for run in (run for run in runs if run.seed == seed):
            said = found.a * 2 ** (-rate * run.bits) + found.d / math.sqrt(run.labels)
            formula.append(abs(run.gap - said))
            means.append(abs(run.gap - statistics.mean(r.gap for r in known if r.labels == run.labels)))
    return statistics.mean(formula), statistics.mean(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="At least 2.")
    parser.add_argument(
        "--steps", type=int, default=150, help="Of each network in floating point; half for the others."
    )
    options = parser.parse_args()
    with quiet_lightning():
        runs = measured(options.seeds, options.steps)
    weights = sum(parameter.numel() for parameter in MLP((64, 64, 10)).parameters())
    print(f"{options.seeds} seeds, {options.steps} + {options.steps // 2} steps; gaps in points, mean over the seeds")
    print(f"{'labels':>6}" + "".join(f"{f'{bits} bits':>9}" for bits in BITS) + "   implied d   bound with d = weights")
    for labels in LABELS:
        gaps = [statistics.mean(r.gap for r in runs if (r.labels, r.bits) == (labels, bits)) for bits in BITS]
        rounding = 2.0 ** -BITS[-1]
        implied = implied_dimension(max(gaps[-1], rounding), labels, BITS[-1])
        bound = performance_bound(weights, labels, BITS[-1])
        print(f"{labels:>6}" + "".join(f"{100 * gap:>9.2f}" for gap in gaps) + f"{implied:>12.2f}{100 * bound:>15.0f}")
    found = recovery_bound_fit(*zip(*((run.gap, run.bits, run.labels) for run in runs), strict=True))
    interval = f"{found.c.value:.2f} [{found.c.low:.2f}, {found.c.high:.2f}]"
    print(
        f"fit: {found.a:.3f} * 2^(-c b) + {found.d:.3f} / sqrt(n), c = {interval}, residual {100 * found.residual:.2f}"
    )
    formula, means = errors_of_left_out(runs)
    print(f"error on a seed that was left out: formula {100 * formula:.2f}, mean for each n {100 * means:.2f} points")


if __name__ == "__main__":
    main()
