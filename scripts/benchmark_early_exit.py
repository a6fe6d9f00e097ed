"""How much time early exits save on this machine's CPU, one sample at a time and in batches.

Trains a residual network with auxiliary heads on MNIST-1D, calibrates the exits on the validation set, and measures
accuracy, operations and time on the test set. Times are medians of interleaved rounds of the same run.

    python scripts/benchmark_early_exit.py --epochs 12 --plot runs/early_exit.png
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import lightning as L
import torch
from torch import Tensor

from lightning_distill import DeepSupervision
from lightning_distill.compression import (
    EarlyExitNetwork,
    calibrate_exits,
    evaluate_exits,
    measure_exits,
    plot_exit_curve,
)
from lightning_distill.datamodules import MNIST1DDataModule
from lightning_distill.losses import AuxiliaryHeads
from lightning_distill.networks import ResNet1d


def train(epochs: int, blocks: int, seed: int) -> tuple[DeepSupervision, MNIST1DDataModule]:
    L.seed_everything(seed, verbose=False)
    student = ResNet1d([52] * blocks)
    taps = [f"blocks.{number}" for number in range(blocks - 1)]
    heads = AuxiliaryHeads(taps, "linear", weights=0.5, pool="flatten", channel_dim=1)
    steps = epochs * 40
    module = DeepSupervision(
        student,
        heads,
        temperature=2.0,
        alpha=0.7,
        optimizer=partial(torch.optim.AdamW, lr=5e-3, weight_decay=0.01),
        lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=5e-3, total_steps=steps),
        lr_interval="step",
    )
    data = MNIST1DDataModule(batch_size=100, seed=seed)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module, data


def seconds(functions: dict[str, Callable[[Tensor], object]], batches: list[Tensor], rounds: int) -> dict[str, float]:
    """Median seconds per sample of each function, the functions taking turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    samples = sum(len(batch) for batch in batches)
    with torch.inference_mode():
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                for batch in batches:
                    function(batch)
                found[name].append((time.perf_counter() - start) / samples)
    return {name: statistics.median(times) for name, times in found.items()}


def run(early: EarlyExitNetwork, sub_batches: bool, batch: Tensor) -> Tensor:
    early.sub_batches = sub_batches
    logits: Tensor = early(batch)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", help="write the accuracy-against-cost curve of the test set to this PNG")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="No sample leaves")
    module, data = train(options.epochs, options.blocks, options.seed)
    x = torch.cat([batch[0] for batch in data.test_dataloader()])
    early = module.export_with_exits()
    plain = early.network
    print(f"torch {torch.__version__}, 1 thread, {len(x)} test samples, ResNet1d with {options.blocks} blocks")
    for drop in (0.0, 0.005, 0.02):
        calibrate_exits(early, data.val_dataloader(), max_drop=drop)
        report = evaluate_exits(early, data.test_dataloader())
        print(f"\nat most {drop:.1%} lost on validation data; on test data:\n{report}")
        split = early.sub_batches
        for size in (1, 64):
            batches = list(x[: 300 if size == 1 else None].split(size))
            functions = {"whole": plain, "early": partial(run, early, False)}
            if size > 1 and split:
                functions["early, sub-batches"] = partial(run, early, True)
            times = seconds(functions, batches, options.rounds)
            shown = ", ".join(f"{name} {1e6 * t:.0f} us ({times['whole'] / t:.2f}x)" for name, t in times.items())
            print(f"batch size {size:2}: {shown} per sample")
    if options.plot:
        measured = measure_exits(early, data.test_dataloader())
        plot_exit_curve(measured.curve(), options.plot, chosen=report)
        print(f"\n{options.plot}")


if __name__ == "__main__":
    main()
