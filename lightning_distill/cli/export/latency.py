"""What PyTorch takes for a batch on the CPU."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_distill.cli.export.trained import call
from lightning_distill.quantization.onnx_runtime import Inputs

REPEATS = 30
TorchTimes = list[float] | str
"""Least seconds of each network, or why there are none."""


def time_torch(networks: Sequence[nn.Module], inputs: Inputs) -> tuple[TorchTimes, TorchTimes]:
    """Least seconds that each network takes for ``inputs`` on one thread: as it is, and by ``torch.compile``.

    The networks take turns: what slows the machine slows them all.
    """
    with torch.no_grad(), _one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*_stable_hash_for_caching")  # torchao's tensors are compiled anew each time
        eager = _least_times(networks, inputs)
        try:
            compiled: TorchTimes = _least_times([torch.compile(network) for network in networks], inputs)
        except RuntimeError as error:  # there is no compiler, or the network cannot be compiled
            compiled = f"not possible here: {str(error).strip().splitlines()[0]}"
    return eager, compiled


def _least_times(networks: Sequence[Callable[..., Any]], inputs: Inputs) -> list[float]:
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(3 + REPEATS):
        for network, taken in zip(networks, times, strict=True):
            start = time.perf_counter()
            call(network, inputs)
            taken.append(time.perf_counter() - start)
    return [min(taken[3:]) for taken in times]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
