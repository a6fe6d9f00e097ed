"""A cost model of ONNX Runtime from files of small networks, in floating point and quantized."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_distill.hardware.calibration import fit_kernels
from lightning_distill.hardware.cost_model import CostModel
from lightning_distill.hardware.counting import LayerCost, count_costs
from lightning_distill.hardware.workloads import Network, calibration_networks
from lightning_distill.quantization import QuantSpec, calibrate, export_onnx, prepare
from lightning_distill.quantization.network import quantizable_layers
from lightning_distill.quantization.onnx_runtime import onnx_latencies

WEIGHTS_ALONE = (2, 4, 8)
_SAMPLES = 4
Measure = Callable[[Sequence[Path], Tensor], Sequence[float]]
"""Seconds of each file for a batch."""


def calibrate_onnx(
    networks: Sequence[Network] | None = None,
    *,
    weights: Sequence[int] = WEIGHTS_ALONE,
    repeats: int = 20,
    threads: int = 1,
    measure: Measure | None = None,
    name: str = "calibrated in ONNX Runtime",
) -> CostModel:
    """Write small networks as ONNX files, time them here and fit a model to them: some minutes, on an idle machine.

    Args:
        networks: Networks with the shape of a sample and the sizes of batches, at least three. Default:
            :func:`~lightning_distill.hardware.calibration_networks`.
        weights: See :func:`time_onnx`, as for the others.
        repeats: Timed runs of each file and batch.
        threads: Of the runtime.
        measure: Gives seconds of each file for a batch, instead.
        name: Of the model.

    Raises:
        ModuleNotFoundError: If the packages of the extra ``onnx`` are missing.
        ValueError: If there are less than three times of networks in floating point, or fewer times than kernels, or a
            number of bits is none.
    """
    chosen = calibration_networks() if networks is None else networks
    counts, seconds = time_onnx(chosen, weights=weights, repeats=repeats, threads=threads, measure=measure)
    return fit_kernels(counts, seconds, runtime="onnx", name=name)


def time_onnx(
    networks: Sequence[Network],
    *,
    weights: Sequence[int] = WEIGHTS_ALONE,
    repeats: int = 20,
    threads: int = 1,
    measure: Measure | None = None,
) -> tuple[list[tuple[LayerCost, ...]], list[float]]:
    """Counts and seconds of networks in ONNX Runtime: in floating point, with weights and inputs of 8 bits, and others.

    The files of a network are timed in turns, and the least time counts, as of
    :func:`~lightning_distill.quantization.onnx_runtime.onnx_latency`.

    Args:
        networks: Networks with the shape of a sample and the sizes of batches; they are left as they are.
        weights: Numbers of bits of weights whose inputs stay in floating point. Networks without linear layers but the
            last have no kernel of 2 bits and are left out there.
        repeats: Timed runs of each file and batch.
        threads: Of the runtime.
        measure: Gives seconds of each file for a batch, instead.
    """
    timed = measure or (lambda paths, batch: _least_seconds(paths, batch, repeats, threads))
    counts: list[tuple[LayerCost, ...]] = []
    seconds: list[float] = []
    for network, shape, batches in networks:
        variants = _variants(network, torch.randn(_SAMPLES, *shape), weights)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.onnx" for number in range(len(variants))]
            for variant, path in zip(variants, paths, strict=True):
                export_onnx(variant, torch.randn(_SAMPLES, *shape), path, tolerance=math.inf)
            for size in batches:
                batch = torch.randn(size, *shape)
                seconds += timed(paths, batch)
                counts += [count_costs(variant, batch) for variant in variants]
    return counts, seconds


def _variants(network: nn.Module, samples: Tensor, weights: Sequence[int]) -> list[nn.Module]:
    """The network in eval mode, and copies of it that are quantized."""
    plain = copy.deepcopy(network).eval()
    layers = quantizable_layers(plain)
    if not layers:
        return [plain]
    linear = sum(isinstance(layer, nn.Linear) for layer in layers.values()) > 1
    specs = [QuantSpec(8, 8, scheme="minmax")]
    specs += [QuantSpec(bits, scheme="auto" if bits <= 2 else "minmax") for bits in weights if linear or bits > 2]
    variants = [plain]
    for spec in specs:
        variant = prepare(copy.deepcopy(plain), spec)
        calibrate(variant, [samples])
        variants.append(variant)
    return variants


def _least_seconds(paths: Sequence[Path], batch: Tensor, repeats: int, threads: int) -> list[float]:
    return [min(times) for times in onnx_latencies(paths, batch, repeats=repeats, threads=threads)]
