"""How well a cost model that is calibrated on this machine's CPU predicts networks that it has not seen.

Fits on the library's calibration networks, then measures others of random shapes: perceptrons, MNIST-1D's networks,
two-dimensional residual networks and transformers. Side by side, in the same run and fitted to the same times: a model
of operations alone. Times are medians of CPU time of one thread, which is latency on a machine that does nothing else
and hardly changes on one that does. Errors are mean |predicted / measured - 1| (MAPE); ranks are Spearman's.

    OMP_NUM_THREADS=1 python scripts/benchmark_cost_model.py --runs 3
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lightning_distill.hardware import (
    CostModel,
    LayerCost,
    calibration_workloads,
    count_costs,
    fit_cost_model,
    measure_latency,
)
from lightning_distill.networks import ConvNet1d, ResNet1d


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


def operations_only(counts: Sequence[Sequence[LayerCost]], seconds: Sequence[float]) -> CostModel:
    """Operations over throughput, the throughput of the least squared relative error."""
    bare = [
        [
            replace(cost, calls=0, convolution_flops=0, padded_flops=0.0, weight_bytes=0.0, activation_bytes=0.0)
            for cost in costs
        ]
        for costs in counts
    ]
    return replace(fit_cost_model(bare, seconds), name="operations alone")


def score(model: CostModel, counts: Sequence[Sequence[LayerCost]], seconds: Sequence[float]) -> tuple[float, float]:
    """MAPE and Spearman's correlation."""
    predicted = np.array([sum(map(model.latency, costs)) for costs in counts])
    measured = np.array(seconds)
    return float(np.abs(predicted / measured - 1).mean()), float(spearmanr(predicted, measured).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1, help="Calibrations and measurements, each from the start.")
    parser.add_argument("--seed", type=int, default=0, help="Of the first run's unseen networks.")
    parser.add_argument("--wall", action="store_true", help="Measure wall time, not CPU time of one thread.")
    parser.add_argument("--save", type=Path, help="Where the last calibrated model is written, as JSON.")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clock = time.perf_counter if options.wall else time.process_time
    seen = calibration_workloads()
    seen_counts = [count_costs(*work) for work in seen]
    for run in range(options.seed, options.seed + options.runs):
        new = unseen(run)
        new_counts = [count_costs(*work) for work in new.values()]
        seen_seconds = [measure_latency(*work, clock=clock) for work in seen]
        new_seconds = [measure_latency(*work, clock=clock) for work in new.values()]
        ours, bare = fit_cost_model(seen_counts, seen_seconds), operations_only(seen_counts, seen_seconds)
        print(f"seed {run}: {len(seen)} networks to calibrate, {len(new)} unseen ones")
        for model in (ours, bare):
            error, rank = score(model, new_counts, new_seconds)
            own, _ = score(model, seen_counts, seen_seconds)
            print(f"  {model.name:16}  MAPE {error:6.1%}  Spearman {rank:.3f}  (MAPE of calibration {own:.1%})")
        print(
            f"  {ours.overhead * 1e6:.1f} µs per call, {ours.throughput / 1e9:.0f} GFLOP/s, convolutions "
            f"{(ours.convolution_throughput or 0) / 1e9:.0f} GFLOP/s, {ours.bandwidth / 1e9:.1f} GB/s"
        )
    print(f"{'unseen, last run':32} {'measured':>10} {'ours':>7} {'operations':>10}   (predicted / measured)")
    for name, costs, seconds in zip(new, new_counts, new_seconds, strict=True):
        ratios = [sum(map(model.latency, costs)) / seconds for model in (ours, bare)]
        print(f"{name:32} {seconds * 1e6:>7.0f} µs {ratios[0]:>7.2f} {ratios[1]:>10.2f}")
    if options.save:
        ours.save(options.save)


if __name__ == "__main__":
    main()
