"""What each recovery step gives a network that was quantized without training, and what validation keeps.

    python scripts/benchmark_recovery.py --seeds 5 --out runs/recovery.json

A convolutional network is trained on the 8x8 digits and quantized. The steps see 256 training images without labels;
which one is kept is decided by the accuracy on the validation images; reported are accuracies on the test images.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from lightning_distill import KD
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.networks import ConvNet2d
from lightning_distill.quantization import QuantSpec, calibrate, prepare
from lightning_distill.recovery import (
    LinearCorrector,
    OutputCalibrator,
    correct_bias,
    fit_linear_corrector,
    recalibrate_batch_norm,
    recover,
)


def train(seed: int) -> tuple[nn.Module, DigitsDataModule]:
    L.seed_everything(seed, verbose=False)
    datamodule = DigitsDataModule(batch_size=64, seed=seed)
    module = KD(ConvNet2d((16, 32, 32)), alpha=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-3))
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=8, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule)
    return module.export(), datamodule


def accuracy(network: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    network.eval()
    with torch.no_grad():
        return 100 * (network(data[0]).argmax(dim=1) == data[1]).double().mean().item()


def run(seed: int, weights: int) -> dict[str, object]:
    original, datamodule = train(seed)
    rows = torch.randperm(len(datamodule.splits.train[0]), generator=torch.Generator().manual_seed(seed))[:256]
    images = datamodule.splits.train[0][rows]
    batches = [(part,) for part in images.split(64)]
    network = prepare(copy.deepcopy(original), QuantSpec(weights=weights, activations=8))
    calibrate(network, batches)
    validation, test = datamodule.splits.validation, datamodule.splits.test

    def linear(part: nn.Module) -> nn.Module:
        calibrator = OutputCalibrator(part, LinearCorrector(0, 10))
        fit_linear_corrector(calibrator, batches, original)
        return calibrator

    def both(part: nn.Module) -> nn.Module:
        recalibrate_batch_norm(part, batches)
        return linear(part)

    def all_means(part: nn.Module) -> None:
        recalibrate_batch_norm(part, batches)
        correct_bias(part, batches)

    steps: dict[str, Callable[[nn.Module], object]] = {
        "batch normalization": lambda part: recalibrate_batch_norm(part, batches),
        "batch normalization, mean over batches": lambda part: recalibrate_batch_norm(
            part, batches, statistics="cumulative"
        ),
        "bias correction": lambda part: correct_bias(part, batches),
        "batch normalization, then bias correction": all_means,
        "linear output correction": linear,
        "batch normalization, then linear output correction": both,
    }
    tested: dict[str, float] = {"full precision": accuracy(original, test), "quantized": accuracy(network, test)}
    candidates: list[nn.Module] = []

    def score(part: nn.Module) -> float:
        candidates.append(part)
        return accuracy(part, validation)

    best, report = recover(network, steps, score)
    for name, part in zip(steps, candidates[1:], strict=True):
        tested[name] = accuracy(part, test)
    tested["what validation keeps"] = accuracy(best, test)
    return {"seed": seed, "weights": weights, "kept": report.kept, "test": tested}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--out", type=Path, default=Path("runs/recovery.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [run(seed, bits) for bits in arguments.bits for seed in range(arguments.seeds)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1))
    for bits in arguments.bits:
        runs = [result for result in found if result["weights"] == bits]
        print(f"\n{bits}-bit weights, 8-bit inputs, {len(runs)} seeds: mean test accuracy (lowest, highest)")
        for name in runs[0]["test"]:
            values = [result["test"][name] for result in runs]
            print(f"  {name:52} {sum(values) / len(values):6.2f} ({min(values):.2f}, {max(values):.2f})")
        print("  kept:", [result["kept"] for result in runs])


if __name__ == "__main__":
    main()
