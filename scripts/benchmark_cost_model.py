"""How well a cost model that is calibrated on this machine's CPU predicts networks that it has not seen.

Fits on the library's calibration networks, then measures others of random shapes: perceptrons, MNIST-1D's networks,
two-dimensional convolutional and residual networks and transformers. Side by side, in the same run and fitted to the
same times: one formula for all operations (overhead, operations, bytes), and operations alone. Errors are mean
|predicted / measured - 1| (MAPE); ranks are Spearman's.

    OMP_NUM_THREADS=1 python scripts/benchmark_cost_model.py --runs 3
    OMP_NUM_THREADS=1 python scripts/benchmark_cost_model.py --runtime onnx --runs 3

Of eager mode, times are CPU time of one thread, which is latency on a machine that does nothing else and hardly changes
on one that does; each network is measured three times, each time in another order, and the median counts. Of ONNX
Runtime they are the least of the runs, of files in float32, with weights and inputs of 8 bits (w8a8), and with weights
alone (w8, w4, w2); it is calibrated once, and the networks of `benchmark_onnx.py` come on top.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from benchmark_onnx import NETWORKS, SPECS, Block
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightning_distill.hardware import (
    CostModel,
    LayerCost,
    calibration_networks,
    calibration_workloads,
    count_costs,
    fit_cost_model,
    fit_kernels,
    measure_latency,
    time_onnx,
)
from lightning_distill.networks import ConvNet1d, ConvNet2d, ResNet1d
from lightning_distill.quantization import calibrate, export_onnx, prepare
from lightning_distill.quantization.onnx_runtime import onnx_latencies

Counts = Sequence[Sequence[LayerCost]]
TURNS = 3
FORMATS = ("float32", "w8a8", "w8", "w4", "w2")


class Residual(nn.Module):
    """Two convolutions around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


def residual(width: int, depth: int) -> nn.Module:
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
    body = [Residual(width) for _ in range(depth)]
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def perceptron(width: int, depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers, nn.LayerNorm(width), nn.Linear(width, 10))


def transformer(width: int, heads: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, heads, 2 * width, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def unseen(seed: int) -> dict[str, tuple[nn.Module, Tensor]]:
    """Twenty networks of random shapes; none has a shape of the calibration."""
    draw = random.Random(seed)
    work: dict[str, tuple[nn.Module, Tensor]] = {}
    for _ in range(4):
        width, depth, batch = draw.choice((96, 200, 384, 768)), draw.randint(1, 5), draw.choice((1, 4, 32, 200))
        work[f"perceptron {width}x{depth}, {batch}"] = (perceptron(width, depth), torch.randn(batch, width))
        widths, batch = [draw.choice((12, 24, 40)) for _ in range(draw.randint(2, 4))], draw.choice((1, 16, 200))
        work[f"ConvNet1d {widths}, {batch}"] = (ConvNet1d(widths), torch.randn(batch, 1, 40))
        widths, batch = [draw.choice((16, 28, 52)) for _ in range(draw.randint(2, 4))], draw.choice((1, 10, 64))
        work[f"ResNet1d {widths}, {batch}"] = (ResNet1d(widths), torch.randn(batch, 1, 40))
        width, depth, batch = draw.choice((20, 32, 40, 80)), draw.randint(1, 4), draw.choice((1, 4, 12))
        work[f"residual {width}x{depth}, {batch}"] = (residual(width, depth), torch.randn(batch, 3, 32, 32))
        width, depth, batch = draw.choice((48, 96, 128, 256)), draw.randint(1, 4), draw.choice((1, 2, 6))
        length = draw.choice((10, 50, 100))
        work[f"transformer {width}x{depth}, {batch}x{length}"] = (
            transformer(width, 4, depth),
            torch.randn(batch, length, width),
        )
    return work


class PlainTransformer(nn.Module):
    """Of linear layers, which can be quantized."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(*(Block(width) for _ in range(depth))), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean(dim=1))


Exported = dict[str, tuple[nn.Module, tuple[int, ...], list[int]]]


def unseen_onnx(seed: int) -> Exported:
    """Ten networks of random shapes, the shape of a sample, and two sizes of batches for each."""
    draw = random.Random(seed)
    work: Exported = {}
    for number in range(2):
        width, depth = draw.choice((96, 200, 384, 768)), draw.randint(1, 4)
        work[f"perceptron {width}x{depth} #{number}"] = (
            perceptron(width, depth), (width,), draw.sample((1, 2, 8, 32, 100), 2)
        )  # fmt: skip
        widths = [draw.choice((12, 24, 40)) for _ in range(draw.randint(2, 4))]
        work[f"ConvNet1d {widths} #{number}"] = (ConvNet1d(widths), (1, 40), draw.sample((1, 4, 16, 100), 2))
        widths = [draw.choice((16, 28, 52)) for _ in range(draw.randint(2, 4))]
        work[f"ResNet1d {widths} #{number}"] = (ResNet1d(widths), (1, 40), draw.sample((1, 4, 10, 64), 2))
        if number:
            widths = [draw.choice((16, 28, 48, 96)) for _ in range(draw.randint(2, 4))]
            network: nn.Module = ConvNet2d(widths, channels=3, size=20)
            work[f"ConvNet2d {widths} #{number}"] = (network, (3, 20, 20), draw.sample((1, 4, 12), 2))
        else:
            width, depth = draw.choice((20, 32, 40, 80)), draw.randint(1, 3)
            work[f"residual {width}x{depth} #{number}"] = (
                residual(width, depth), (3, 32, 32), draw.sample((1, 4, 12), 2)
            )  # fmt: skip
        width, depth, length = draw.choice((48, 96, 128, 256)), draw.randint(1, 3), draw.choice((10, 50, 100))
        work[f"transformer {width}x{depth}, {length} #{number}"] = (
            PlainTransformer(width, depth), (length, width), draw.sample((1, 2, 6), 2)
        )  # fmt: skip
    return work


def operations_only(counts: Counts, seconds: Sequence[float]) -> CostModel:
    """Operations over throughput, the throughput of the least squared relative error."""
    bare = [
        [
            replace(cost, calls=0, convolution_flops=0, padded_flops=0.0, weight_bytes=0.0, activation_bytes=0.0)
            for cost in costs
        ]
        for costs in counts
    ]
    return replace(fit_cost_model(bare, seconds), name="operations alone")


def predictions(model: CostModel, counts: Counts) -> list[float]:
    return [model.start + sum(map(model.latency, costs)) for costs in counts]


def score(predicted: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """MAPE and Spearman's correlation."""
    errors = np.abs(np.array(predicted) / np.array(measured) - 1)
    return float(errors.mean()), float(spearmanr(predicted, measured).statistic)


def summary(scores: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Means over the runs, with the least and the largest."""
    for name, values in scores.items():
        errors, ranks = zip(*values, strict=True)
        print(
            f"  {name:36} MAPE {statistics.mean(errors):6.1%} ({min(errors):.1%} to {max(errors):.1%})  "
            f"Spearman {statistics.mean(ranks):.3f} ({min(ranks):.3f} to {max(ranks):.3f})"
        )


def table(names: Sequence[str], measured: Sequence[float], columns: Mapping[str, Sequence[float]]) -> None:
    print(f"{'predicted / measured':44} {'measured':>10}" + "".join(f"{name:>18}" for name in columns))
    for number, (name, seconds) in enumerate(zip(names, measured, strict=True)):
        ratios = "".join(f"{predicted[number] / seconds:>18.2f}" for predicted in columns.values())
        print(f"{name:44} {seconds * 1e6:>7.0f} µs{ratios}")


def kernels(model: CostModel) -> None:
    print(f"{'kernel':40} {'µs/call':>8} {'ns/copy':>9} {'GFLOP/s':>9} {'GB/s':>8} {'GB/s of weights':>16}")
    for name, kernel in model.kernels.items():
        rates = (f"{value / 1e9:.4g}" for value in (kernel.throughput, kernel.bandwidth, kernel.weight_bandwidth))
        one, two, three = rates
        print(f"{name:40} {kernel.overhead * 1e6:>8.2f} {kernel.copy * 1e9:>9.2f} {one:>9} {two:>8} {three:>16}")
    print(f"{'a run':40} {model.start * 1e6:>8.2f}")


def in_turns(work: Sequence[tuple[nn.Module, Tensor]], clock: Callable[[], float]) -> list[float]:
    """Median seconds of each, measured several times, each time in another order."""
    times: list[list[float]] = [[] for _ in work]
    for turn in range(TURNS):
        for number in random.Random(turn).sample(range(len(work)), len(work)):
            times[number].append(measure_latency(*work[number], clock=clock))
    return [statistics.median(taken) for taken in times]


def run_torch(options: argparse.Namespace) -> CostModel:
    clock: Callable[[], float] = time.perf_counter if options.wall else time.process_time
    seen = calibration_workloads()
    seen_counts = [count_costs(*work) for work in seen]
    scores: dict[str, list[tuple[float, float]]] = {}
    for run in range(options.seed, options.seed + options.runs):
        new = unseen(run)
        new_counts = [count_costs(*work) for work in new.values()]
        seconds = in_turns([*seen, *new.values()], clock)
        seen_seconds, new_seconds = seconds[: len(seen)], seconds[len(seen) :]
        print(f"seed {run}: {len(seen)} networks to calibrate, {len(new)} unseen ones")
        models = {
            "kernels": fit_kernels(seen_counts, seen_seconds),
            "one formula": fit_cost_model(seen_counts, seen_seconds),
            "operations alone": operations_only(seen_counts, seen_seconds),
        }
        found = {name: predictions(model, new_counts) for name, model in models.items()}
        for name, predicted in found.items():
            error, rank = score(predicted, new_seconds)
            own, _ = score(predictions(models[name], seen_counts), seen_seconds)
            print(f"  {name:16}  MAPE {error:6.1%}  Spearman {rank:.3f}  (MAPE of calibration {own:.1%})", flush=True)
            scores.setdefault(name, []).append((error, rank))
    table(list(new), new_seconds, found)
    kernels(models["kernels"])
    print(f"mean of {options.runs} seeds:")
    summary(scores)
    return models["kernels"]


def measured_onnx(
    network: nn.Module, shape: tuple[int, ...], batches: Sequence[int], repeats: int
) -> dict[tuple[str, int], tuple[Sequence[LayerCost], float]]:
    """Counts and seconds of a network's files, by format and size of the batch."""
    plain, samples = network.eval(), torch.randn(4, *shape)
    variants = {"float32": plain}
    convolutional = any(isinstance(layer, (nn.Conv1d, nn.Conv2d)) for layer in plain.modules())
    for name in FORMATS[1:]:
        if convolutional and name == "w2":
            continue  # convolutions have no kernel of 2 bits
        variants[name] = prepare(copy.deepcopy(plain), SPECS[name])
        calibrate(variants[name], [samples])
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in variants}
        for name, path in paths.items():
            export_onnx(variants[name], samples, path, tolerance=math.inf)
        for size in batches:
            batch = torch.randn(size, *shape)
            times = onnx_latencies(list(paths.values()), batch, repeats=repeats)
            for name, taken in zip(paths, times, strict=True):
                found[name, size] = (count_costs(variants[name], batch), min(taken))
    return found


def run_onnx(options: argparse.Namespace) -> CostModel:
    seen_counts, seen_seconds = time_onnx(calibration_networks(), repeats=options.repeats)
    ours = fit_kernels(seen_counts, seen_seconds, runtime="onnx")
    plain = [
        (costs, seconds)
        for costs, seconds in zip(seen_counts, seen_seconds, strict=True)
        if all(cost.weight_bits > 8 for cost in costs)
    ]
    models = {
        "kernels": ours,
        "one formula": fit_cost_model(*zip(*plain, strict=True)),
        "operations alone": operations_only(*zip(*plain, strict=True)),
    }
    error, _ = score(predictions(ours, seen_counts), seen_seconds)
    print(f"{len(seen_seconds)} files and batches to calibrate, {len(plain)} in float32; MAPE there {error:.1%}")
    kernels(ours)
    scores: dict[str, list[tuple[float, float]]] = {}
    right: dict[str, list[bool]] = {}
    for run in (*range(options.seed, options.seed + options.runs), None):
        named = {name: (build(), shape, [1, 16]) for name, (build, shape) in NETWORKS.items()}
        names, formats, counts, times = [], [], [], []
        for name, (network, shape, batches) in (named if run is None else unseen_onnx(run)).items():
            for (label, size), (costs, taken) in measured_onnx(network, shape, batches, options.repeats).items():
                names.append(f"{name}, {size} {label}")
                formats.append(label)
                counts.append(costs)
                times.append(taken)
        found = {name: predictions(model, counts) for name, model in models.items()}
        table(names, times, found)
        print("the networks of benchmark_onnx.py" if run is None else f"seed {run}", flush=True)
        for label in FORMATS:
            rows = [row for row, one in enumerate(formats) if one == label]
            for name, predicted in found.items():
                error, rank = score([predicted[row] for row in rows], [times[row] for row in rows])
                print(f"  {label:8} {name:16}  MAPE {error:6.1%}  Spearman {rank:.3f}")
                if run is not None:
                    scores.setdefault(f"{label:8} {name}", []).append((error, rank))
            if run is None or label == "float32":
                continue
            plain_row = {names[row].rsplit(" ", 1)[0]: row for row, one in enumerate(formats) if one == "float32"}
            for row in rows:
                other = plain_row[names[row].rsplit(" ", 1)[0]]
                for name, predicted in found.items():
                    same = (predicted[row] < predicted[other]) == (times[row] < times[other])
                    right.setdefault(f"{label:8} {name}", []).append(same)
    print(f"mean of {options.runs} seeds:")
    summary(scores)
    print("whether it is faster than float32, share that is predicted right:")
    for name, answers in right.items():
        print(f"  {name:36} {sum(answers) / len(answers):6.1%} of {len(answers)}")
    return ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", choices=("torch", "onnx"), default="torch")
    parser.add_argument("--runs", type=int, default=1, help="Sets of unseen networks.")
    parser.add_argument("--seed", type=int, default=0, help="Of the first set.")
    parser.add_argument("--wall", action="store_true", help="Of eager mode, measure wall time.")
    parser.add_argument("--repeats", type=int, default=20, help="Of ONNX Runtime, timed runs of each file and batch.")
    parser.add_argument("--save", type=Path, help="Where the last calibrated model is written, as JSON.")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = run_torch(options) if options.runtime == "torch" else run_onnx(options)
    if options.save:
        model.save(options.save)


if __name__ == "__main__":
    main()
