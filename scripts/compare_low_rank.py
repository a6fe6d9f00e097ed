"""Low-rank students of a residual network on MNIST-1D: from where they start, and what the teacher adds.

Per seed one teacher. Every student has the ranks that `factorize(parameters=…, batches=…)` chose, and trains for as
many epochs with the same learning rate. Nothing is tuned. Test accuracy, in points.

    python scripts/compare_low_rank.py --seeds 3
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from functools import partial

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from torch import nn

from lightning_distill import KD
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.compression import factorize
from lightning_distill.datamodules import MNIST1DDataModule
from lightning_distill.networks import ResNet1d

RATE = 5e-3


def train(module: KD, data: MNIST1DDataModule, epochs: int) -> None:
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


def distillation(student: nn.Module, teacher: nn.Module | None, alpha: float, epochs: int) -> KD:
    steps = epochs * 40
    return KD(
        student,
        teacher,
        temperature=4.0,
        alpha=alpha,
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.01),
        lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=RATE, total_steps=steps),
        lr_interval="step",
    )


@torch.no_grad()
def accuracy(network: nn.Module, data: MNIST1DDataModule) -> float:
    network.eval()
    right = [(network(batch[0]).argmax(-1) == batch[1]).float() for batch in data.test_dataloader()]
    return 100 * torch.cat(right).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parameters", type=float, default=0.2, help="Share of the weights.")
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    quiet_lightning()
    found: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        L.seed_everything(seed, verbose=False)
        data = MNIST1DDataModule(batch_size=100, seed=seed)
        teacher = ResNet1d()
        train(distillation(teacher, None, 1.0, options.teacher_epochs), data, options.teacher_epochs)
        found.setdefault("teacher", []).append(accuracy(teacher, data))
        batches = [batch[0] for batch, _ in zip(data.train_dataloader(), range(5), strict=False)]
        aware, plain, scratch = (copy.deepcopy(teacher) for _ in range(3))
        report = factorize(aware, parameters=options.parameters, batches=batches)
        ranks = {layer.name: layer.rank for layer in report.layers if layer.rank is not None}
        factorize(plain, rank=ranks)
        factorize(scratch, rank=ranks)
        scratch.apply(lambda module: getattr(module, "reset_parameters", lambda: None)())
        starts = {"outputs": aware, "weights": plain, "new weights": scratch}
        for name, student in starts.items():
            found.setdefault(f"{name}, untrained", []).append(accuracy(student, data))
            for how, alpha in (("labels", 1.0), ("labels and teacher", 0.5)):
                network = copy.deepcopy(student)
                L.seed_everything(seed, verbose=False)
                module = distillation(network, teacher if alpha < 1 else None, alpha, options.epochs)
                train(module, data, options.epochs)
                found.setdefault(f"{name}, {how}", []).append(accuracy(network, data))
    print(f"{report.after:,} of {report.before:,} weights, {options.epochs} epochs, {options.seeds} seeds, rate {RATE}")
    for name, values in found.items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name:32} {statistics.mean(values):5.1f} ± {deviation:.1f}")


if __name__ == "__main__":
    main()
