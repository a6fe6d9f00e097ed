"""Quantization-aware distillation beside NVIDIA ModelOpt's, from the same float network, on the same batches.

    pip install --target /some/folder --no-deps nvidia-modelopt==0.47.0 ninja nvidia-ml-py omegaconf pulp \
        antlr4-python3-runtime==4.9.3
    PYTHONPATH=/some/folder python scripts/compare_modelopt.py --seeds 5 --out runs/modelopt.json

(ModelOpt needs newer packages than this library; a folder of its own keeps them out of the environment.) A ConvNet1d is
trained on MNIST-1D once per seed. Its copies go down to 8-bit inputs and 2- or 8-bit weights and learn from it without
labels: the same samples in the same order, KL divergence at temperature 1, AdamW with one cycle, no weight decay.
ModelOpt's weights get the scales of its search by squared error (``algorithm: mse``), which stay as they are; ours are
searched likewise and then learned. Learning rates are chosen for each of the rows on validation data, with seeds of
their own. ``float`` is the same further training without quantization.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.comparison.statistics import paired_gain
from lightning_distill.datamodules import MNIST1DDataModule
from lightning_distill.networks import ConvNet1d
from lightning_distill.quantization import QuantSpec, calibrate, prepare

Batch = tuple[Tensor, Tensor]
WIDTHS = (12, 12, 12)
BATCH = 100


def ours(bits: int) -> Callable[[nn.Module, Tensor], nn.Module]:
    def quantized(network: nn.Module, known: Tensor) -> nn.Module:
        student = prepare(network, QuantSpec(bits, 8))
        calibrate(student, [known])
        return student

    return quantized


def modelopts(bits: int) -> Callable[[nn.Module, Tensor], nn.Module]:
    def quantized(network: nn.Module, known: Tensor) -> nn.Module:
        import modelopt.torch.quantization as mtq

        configuration = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
        for entry in configuration["quant_cfg"]:
            if entry["quantizer_name"] == "*weight_quantizer":
                entry["cfg"]["num_bits"] = bits
        configuration["algorithm"] = "mse"
        found: nn.Module = mtq.quantize(network.eval(), configuration, lambda model: model(known))
        return found

    return quantized


ROWS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "float": lambda network, known: network,
    "ours w8a8": ours(8),
    "modelopt w8a8": modelopts(8),
    "ours w2a8": ours(2),
    "modelopt w2a8": modelopts(2),
}


def fit(
    network: nn.Module, data: Batch, loss: Callable[[Tensor, Batch], Tensor], *, rate: float, steps: int, seed: int
) -> nn.Module:
    """Train in place, in an order that ``seed`` decides; in eval mode afterwards."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps)
    network.train()
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data[0]), generator=generator)
        batch, order = (data[0][order[:BATCH]], data[1][order[:BATCH]]), order[BATCH:]
        optimizer.zero_grad()
        loss(network(batch[0]), batch).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def accuracy(network: nn.Module, data: Batch) -> float:
    with torch.no_grad():
        return 100 * float((network.eval()(data[0]).argmax(dim=-1) == data[1]).float().mean())


def taught(teacher: nn.Module) -> Callable[[Tensor, Batch], Tensor]:
    def loss(logits: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[0]).log_softmax(dim=-1)
        return F.kl_div(logits.log_softmax(dim=-1), target, log_target=True, reduction="batchmean")

    return loss


def splits_of(seed: int) -> tuple[Batch, Batch, Batch]:
    datamodule = MNIST1DDataModule(batch_size=BATCH, seed=seed)
    splits = datamodule.splits
    assert splits.validation is not None
    assert splits.test is not None
    return splits.train, splits.validation, splits.test


def float_network(seed: int, train: Batch, steps: int) -> nn.Module:
    torch.manual_seed(seed)
    loss = lambda logits, batch: F.cross_entropy(logits, batch[1])  # noqa: E731
    return fit(ConvNet1d(widths=WIDTHS), train, loss, rate=0.01, steps=steps, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="after the float training, which has 1000")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    parser.add_argument("--rate-seeds", type=int, nargs="+", default=[100, 101])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)

    scores: dict[str, dict[float, list[float]]] = {row: {rate: [] for rate in args.rates} for row in ROWS}
    for seed in args.rate_seeds:
        train, validation, _ = splits_of(seed)
        teacher = float_network(seed, train, 1000)
        for row, quantized in ROWS.items():
            for rate in args.rates:
                student = quantized(copy.deepcopy(teacher), train[0][:256])
                fit(student, train, taught(teacher), rate=rate, steps=args.steps, seed=seed)
                scores[row][rate].append(accuracy(student, validation))
    rates = {row: max(found, key=lambda rate: mean(found[rate])) for row, found in scores.items()}
    for row, found in scores.items():
        said = ", ".join(f"{rate}: {mean(values):.2f}" for rate, values in found.items())
        print(f"{row:14} validation {said}; chosen {rates[row]}", flush=True)

    names = ["teacher", *(f"{row}{kind}" for row in ROWS for kind in (", untrained", ""))]
    results: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(args.seeds):
        train, _, test = splits_of(seed)
        teacher = float_network(seed, train, 1000)
        results["teacher"].append(accuracy(teacher, test))
        for row, quantized in ROWS.items():
            student = quantized(copy.deepcopy(teacher), train[0][:256])
            results[f"{row}, untrained"].append(accuracy(student, test))
            fit(student, train, taught(teacher), rate=rates[row], steps=args.steps, seed=seed)
            results[row].append(accuracy(student, test))
    for name, values in results.items():
        print(f"{name:25} {mean(values):.2f} ± {stdev(values):.2f}")
    for first, second in (
        ("ours w8a8", "modelopt w8a8"), ("ours w2a8", "modelopt w2a8"),
        ("ours w8a8", "float"), ("modelopt w8a8", "float"),
    ):  # fmt: skip
        gain = paired_gain(results[first], results[second])
        print(f"{first} - {second}: {gain.gain:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] (95 %, not corrected)")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"rates": rates, "accuracy": results}, indent=1))


if __name__ == "__main__":
    main()
