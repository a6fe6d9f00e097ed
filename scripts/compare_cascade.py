"""A cascade of 2, 4 and 8 bits beside early exits of the same network, on MNIST-1D: accuracy against bit operations.

Per seed one residual network is trained with heads on its inner blocks. It goes on as early exits (more training with
heads, then 8 bits), and as three students of 2, 4 and 8 bits that it teaches. Every network gets the same epochs at the
same learning rates; the cascade needs three second trainings where early exits need one. Nothing is tuned but the
thresholds: on validation data, for each loss that is allowed. All figures are of the test data, all costs shares of the
bit operations of the whole network at 8 bits.

    python scripts/compare_cascade.py --seeds 3 --plot runs/cascade.png
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from torch import nn

from lightning_distill import DeepSupervision, QADModule
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.compression import (
    EarlyExitNetwork,
    ExitReport,
    PrecisionCascade,
    calibrate_cascade,
    calibrate_exits,
    evaluate_cascade,
    evaluate_exits,
    measure_cascade,
    plot_exit_curves,
)
from lightning_distill.datamodules import MNIST1DDataModule
from lightning_distill.losses import AuxiliaryHeads
from lightning_distill.modules import DistillationModule
from lightning_distill.networks import ResNet1d
from lightning_distill.quantization import QuantSpec, calibrate, prepare

BITS = (2, 4, 8)
DROPS = (0.0, 0.005, 0.01, 0.02, 0.05)
RATES = (5e-3, 2e-3)
BATCHES = 40


def fit(module: DistillationModule, data: MNIST1DDataModule, epochs: int) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)


def optimization(rate: float, epochs: int) -> dict[str, Any]:
    return {
        "optimizer": partial(torch.optim.AdamW, lr=rate, weight_decay=0.01),
        "lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=rate, total_steps=BATCHES * epochs),
        "lr_interval": "step",
    }


def supervised(network: nn.Module, heads: AuxiliaryHeads, rate: float, epochs: int) -> DeepSupervision:
    settings: Any = optimization(rate, epochs)
    return DeepSupervision(network, heads, temperature=2.0, alpha=0.7, **settings)


def networks(
    seed: int, width: int, epochs: int, more: int
) -> tuple[EarlyExitNetwork, PrecisionCascade, MNIST1DDataModule]:
    """Early exits at 8 bits and the cascade, of one first network."""
    L.seed_everything(seed, verbose=False)
    data = MNIST1DDataModule(batch_size=100, seed=seed)
    network = ResNet1d([width] * 3)
    heads = AuxiliaryHeads(["blocks.0", "blocks.1"], "linear", weights=0.5, pool="flatten", channel_dim=1)
    fit(supervised(network, heads, RATES[0], epochs), data, epochs)
    members: list[nn.Module] = []
    settings: Any = optimization(RATES[1], more)
    for bits in BITS:
        L.seed_everything(seed, verbose=False)
        student = QADModule(
            copy.deepcopy(network),
            spec=QuantSpec(bits, activations=8),
            temperature=2.0,
            alpha=0.7,
            **settings,
        )
        fit(student, data, more)
        members.append(student.student.eval())
    L.seed_everything(seed, verbose=False)
    again = supervised(network, heads, RATES[1], more)
    fit(again, data, more)
    early = again.export_with_exits().eval()
    prepare(early, QuantSpec(8, activations=8))
    x = torch.cat([batch[0] for batch, _ in zip(data.train_dataloader(), range(5), strict=False)])
    calibrate(early, [x], run=lambda module, batch: module.all_logits(batch))  # type: ignore[operator]
    return early, PrecisionCascade(members).eval(), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=52, help="Channels of the network.")
    parser.add_argument("--epochs", type=int, default=8, help="Of the first network.")
    parser.add_argument("--more", type=int, default=4, help="Epochs of each second training.")
    parser.add_argument("--plot", type=Path, help="Write the first seed's points to this PNG.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="No sample leaves")
    found: dict[str, list[ExitReport]] = {}
    with quiet_lightning():
        for seed in range(options.seeds):
            early, cascade, data = networks(seed, options.width, options.epochs, options.more)
            validation, test = data.val_dataloader(), data.test_dataloader()
            marks = {f"{name} alone": report for name, report in measure_cascade(cascade, test).alone().items()}
            for name, report in marks.items():
                found.setdefault(name, []).append(report)
            for drop in DROPS:
                calibrate_exits(early, validation, max_drop=drop)
                found.setdefault(f"early exits, {drop:.1%} allowed", []).append(evaluate_exits(early, test))
                for escalate in ("next", "direct"):
                    cascade.escalate, cascade.thresholds = escalate, [float("inf")] * (len(BITS) - 1)
                    calibrate_cascade(cascade, validation, max_drop=drop)
                    report = evaluate_cascade(cascade, test)
                    found.setdefault(f"cascade ({escalate}), {drop:.1%} allowed", []).append(report)
            if options.plot and seed == 0:
                ways = ("early exits", "cascade (next)", "cascade (direct)")
                curves = {way: [found[f"{way}, {drop:.1%} allowed"][0] for drop in DROPS] for way in ways}
                plot_exit_curves(curves, options.plot, marks=marks)
    setting = f"{options.seeds} seeds, width {options.width}, {options.epochs} + {options.more} epochs, rates {RATES}"
    print(f"{setting}, test accuracy in points")
    for name, reports in sorted(found.items(), key=lambda item: item[0].split(",")[0]):
        accuracies = [100 * report.accuracy for report in reports]
        deviation = statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0
        cost = statistics.mean(report.relative_cost for report in reports)
        lost = statistics.mean(100 * (report.full_accuracy - report.accuracy) for report in reports)
        bits = statistics.mean(report.average_bits for report in reports)
        shown = "" if bits != bits else f"   {bits:.2f} bits"
        accuracy = f"{statistics.mean(accuracies):5.1f} ± {deviation:.1f}"
        print(f"{name:32} {accuracy}   lost {lost:5.2f}   cost {cost:6.1%}{shown}")


if __name__ == "__main__":
    main()
