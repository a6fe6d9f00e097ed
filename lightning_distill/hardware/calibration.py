"""The constants of a cost model from measured networks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor, nn

from lightning_distill.hardware.cost_model import CostModel
from lightning_distill.hardware.counting import LayerCost, count_costs
from lightning_distill.hardware.kernels import Kernel, Runtime, Use, kernel_use
from lightning_distill.hardware.workloads import Workload, calibration_workloads
from lightning_distill.modes import inference

_AMOUNTS = len(Use("").amounts)
_REWEIGHTED = 8  # times, for a fit that a few wrong times do not spoil


def fit_cost_model(
    counts: Sequence[Sequence[LayerCost]], seconds: Sequence[float], *, name: str = "calibrated"
) -> CostModel:
    """Overhead, throughputs and bandwidth of the least squared relative error, none of them negative.

    The same constants for all kinds of operations; :func:`fit_kernels` finds some for each.

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
    _check(counts, seconds)
    table = np.array([_features(costs) for costs in counts], dtype=np.float64)
    overhead, per_flop, per_convolution_flop, per_byte = _least_relative(table, seconds, reweighted=0)
    return CostModel(
        overhead=overhead,
        throughput=_rate(per_flop),
        convolution_throughput=_rate(per_convolution_flop) if table[:, 2].any() else None,
        bandwidth=_rate(per_byte),
        name=name,
    )


def fit_kernels(
    counts: Sequence[Sequence[LayerCost]],
    seconds: Sequence[float],
    *,
    runtime: Runtime = "torch",
    name: str = "calibrated",
) -> CostModel:
    """Constants for each kernel that the networks use, of a small relative error, none negative.

    Squared relative errors count up to twice their median, and larger ones linearly (Huber): a few wrong times do not
    move the rest. Kernels that always come together cannot be told apart.

    Args:
        counts: Of networks, quantized ones too; at least three are in floating point.
        seconds: How long each took for its batch in ``runtime``, positive.
        runtime: ``"torch"`` or ``"onnx"``.
        name: Of the model.

    Returns:
        The model; its constants for all operations are those of the networks in floating point.

    Raises:
        ValueError: If there are less than three networks in floating point, fewer networks than kernels, not one time
            for each, or a time is not positive.
    """
    _check(counts, seconds)
    plain = [i for i, costs in enumerate(counts) if all(cost.weight_bits > 8 for cost in costs)]
    simple = fit_cost_model([counts[i] for i in plain], [seconds[i] for i in plain], name=name)
    uses = [[kernel_use(each, cost, runtime) for cost in costs for each in cost.operations] for costs in counts]
    names = sorted({use.kernel for of_network in uses for use in of_network})
    if len(names) > len(seconds):
        raise ValueError(
            f"{len(seconds)} times do not tell {len(names)} kernels apart. Measure more networks or batches."
        )
    place = {kernel: 1 + _AMOUNTS * number for number, kernel in enumerate(names)}
    table = np.zeros((len(uses), 1 + _AMOUNTS * len(names)))
    table[:, 0] = runtime == "onnx"  # a session has to be called; eager mode only starts its operations
    for row, of_network in zip(table, uses, strict=True):
        for use in of_network:
            row[place[use.kernel] : place[use.kernel] + _AMOUNTS] += use.amounts
    start, *found = _least_relative(table, seconds, reweighted=_REWEIGHTED)
    constants = zip(*[iter(found)] * _AMOUNTS, strict=True)
    kernels = {kernel: Kernel.of_seconds(each) for kernel, each in zip(names, constants, strict=True)}
    return replace(simple, kernels=kernels, runtime=runtime, start=start)


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
    turns: int = 3,
    name: str = "calibrated",
) -> CostModel:
    """Measure small networks in eager mode here and fit a model to them: ten seconds, on a machine that is idle.

    Args:
        workloads: Networks and batches, at least three, of the kinds that will be estimated. Default:
            :func:`calibration_workloads`, on the CPU.
        measure: Gives seconds of a network and a batch.
        turns: How often each is measured, one after the other; the median counts.
        name: Of the model.

    Raises:
        ValueError: If there are less than three networks, or fewer than kernels, or ``turns`` is not positive.
    """
    if turns < 1:
        raise ValueError(f"`turns` must be positive, got {turns}.")
    chosen = calibration_workloads() if workloads is None else workloads
    counts = [count_costs(network, batch) for network, batch in chosen]
    times = [[measure(network, batch) for network, batch in chosen] for _ in range(turns)]
    return fit_kernels(counts, [statistics.median(each) for each in zip(*times, strict=True)], name=name)


def _check(counts: Sequence[Sequence[LayerCost]], seconds: Sequence[float]) -> None:
    if len(counts) < 3 or len(counts) != len(seconds):
        raise ValueError(f"A fit needs one time for each of at least 3 networks, got {len(counts)}, {len(seconds)}.")
    if wrong := [value for value in seconds if not value > 0]:
        raise ValueError(f"`seconds` must be positive, got {wrong[0]}.")


def _least_relative(table: NDArray[Any], seconds: Sequence[float], *, reweighted: int) -> list[float]:
    """Factors, none negative, with which the columns of ``table`` add up to ``seconds``."""
    relative = table / np.array(seconds)[:, None]
    scale = np.where(relative.any(axis=0), relative.max(axis=0), 1.0)  # columns of very different size
    weights = np.ones(len(relative))
    for _ in range(reweighted + 1):
        found, _ = nnls(relative / scale * weights[:, None], weights)
        errors = np.abs(relative / scale @ found - 1)
        bound = max(2 * float(np.median(errors)), 1e-9)
        weights = np.sqrt(bound / np.maximum(errors, bound))
    return [float(value) for value in found / scale]


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
