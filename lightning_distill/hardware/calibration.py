"""The constants of a cost model from measured networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from lightning_distill.hardware.cost_model import CostModel
from lightning_distill.hardware.counting import LayerCost, count_costs
from lightning_distill.modes import inference

Workload = tuple[nn.Module, Tensor]
"""A network and a batch for it."""


def fit_cost_model(
    counts: Sequence[Sequence[LayerCost]], seconds: Sequence[float], *, name: str = "calibrated"
) -> CostModel:
    """Overhead, throughputs and bandwidth of the least squared relative error, none of them negative.

    Args:
        counts: Of at least three networks in float32, see :func:`count_costs`.
        seconds: How long each took for its batch, positive.
        name: Of the model.

    Returns:
        The model. What costs nothing in the fit gets overhead 0, or infinite throughput or bandwidth. Without any
        convolution their throughput is that of products of matrices.

    Raises:
        ValueError: If there are less than three networks, not one time for each, or a time is not positive.
    """
    if len(counts) < 3 or len(counts) != len(seconds):
        raise ValueError(f"A fit needs one time for each of at least 3 networks, got {len(counts)}, {len(seconds)}.")
    if wrong := [value for value in seconds if not value > 0]:
        raise ValueError(f"`seconds` must be positive, got {wrong[0]}.")
    table = np.array([_features(costs) for costs in counts], dtype=np.float64) / np.array(seconds)[:, None]
    scale = table.max(axis=0).clip(min=np.finfo(np.float64).tiny)  # columns of very different size
    found, _ = nnls(table / scale, np.ones(len(table)))
    overhead, per_flop, per_convolution_flop, per_byte = (float(value) for value in found / scale)
    return CostModel(
        overhead=overhead,
        throughput=_rate(per_flop),
        convolution_throughput=_rate(per_convolution_flop) if table[:, 2].any() else None,
        bandwidth=_rate(per_byte),
        name=name,
    )


def measure_latency(
    model: nn.Module,
    batch: Tensor,
    *,
    rounds: int = 15,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median seconds of ``model(batch)`` in eval mode without gradients.

    Args:
        model: Any network.
        batch: What it reads, on its device.
        rounds: Passes that are timed, positive.
        warmup: Passes before them.
        clock: Gives seconds.

    Raises:
        ValueError: If ``rounds`` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"`rounds` must be positive, got {rounds}.")
    times = []
    with inference(model):
        for _ in range(warmup):
            model(batch)
        _wait(batch)
        for _ in range(rounds):
            start = clock()
            model(batch)
            _wait(batch)
            times.append(clock() - start)
    return statistics.median(times)


def calibrate_cost_model(
    workloads: Sequence[Workload] | None = None,
    *,
    measure: Callable[[nn.Module, Tensor], float] = measure_latency,
    name: str = "calibrated",
) -> CostModel:
    """Measure small networks here and fit a model to them: some seconds, in which the machine should be idle.

    Args:
        workloads: Networks and batches, at least three, of the kinds that will be estimated. Default:
            :func:`calibration_workloads`, on the CPU.
        measure: Gives seconds of a network and a batch.
        name: Of the model.

    Raises:
        ValueError: If there are less than three networks.
    """
    chosen = calibration_workloads() if workloads is None else workloads
    counts = [count_costs(network, batch) for network, batch in chosen]
    return fit_cost_model(counts, [measure(network, batch) for network, batch in chosen], name=name)


def calibration_workloads() -> list[Workload]:
    """Perceptrons, convolutional networks and transformers of several sizes, with batches of 1 and more."""
    sizes = [(64, 64, 10), (256, 512, 512, 10), (1024, 1024, 1024, 1024)]
    work: list[Workload] = [(_mlp(each), torch.randn(batch, each[0])) for each in sizes for batch in (1, 16, 128)]
    for widths in ((8, 16), (16, 32, 64), (64, 96)):
        work += [(_convolutional(widths, 2), torch.randn(batch, 3, 24, 24)) for batch in (1, 8, 32)]
    for widths in ((16, 32), (24, 48, 24)):
        work += [(_convolutional(widths, 1), torch.randn(batch, 3, 64)) for batch in (1, 16, 128)]
    for width, depth in ((32, 1), (64, 3), (192, 2)):
        work += [(_transformer(width, depth), torch.randn(batch, 32, width)) for batch in (1, 8)]
    return work


def _features(costs: Sequence[LayerCost]) -> list[float]:
    convolutions = sum(cost.convolution_flops for cost in costs)
    calls, flops = sum(cost.calls for cost in costs), sum(cost.flops for cost in costs)
    padded = sum(cost.padded_flops for cost in costs)
    return [calls, flops - convolutions, padded, sum(cost.bytes for cost in costs)]


def _rate(seconds: float) -> float:
    return 1 / seconds if seconds else float("inf")


def _wait(batch: Tensor) -> None:
    if batch.device.type == "cuda":
        torch.cuda.synchronize(batch.device)


def _mlp(sizes: Sequence[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolutional(widths: Sequence[int], dimensions: int) -> nn.Module:
    convolution = nn.Conv1d if dimensions == 1 else nn.Conv2d
    norm = nn.BatchNorm1d if dimensions == 1 else nn.BatchNorm2d
    pool = nn.AdaptiveAvgPool1d if dimensions == 1 else nn.AdaptiveAvgPool2d
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *widths)):
        layers += [convolution(inputs, outputs, 3, stride=2, padding=1, bias=False), norm(outputs), nn.ReLU()]
        layers += [convolution(outputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, pool(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def _transformer(width: int, depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
