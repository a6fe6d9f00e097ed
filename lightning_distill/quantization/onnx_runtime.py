"""Networks in ONNX files, run and timed by ONNX Runtime on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]


class OnnxNetwork(nn.Module):
    """The network in an ONNX file, for inference: it is called as the one that was exported, and says logits.

    Whatever measures a network can so measure the file.

    Args:
        path: An ``.onnx`` file.
        threads: Of the runtime.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        super().__init__()
        self._session = _session(path, threads=threads)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The first output."""
        return torch.from_numpy(self._session.run(None, _feeds(self._session, named or inputs))[0])


def run_onnx(path: str | Path, inputs: Inputs) -> Tensor:
    """What the network in an ONNX file says about ``inputs``."""
    session = _session(path, threads=1)
    return torch.from_numpy(session.run(None, _feeds(session, inputs))[0])


def onnx_latency(path: str | Path, inputs: Inputs, *, repeats: int = 30, threads: int = 1) -> float:
    """Least seconds that ONNX Runtime takes for ``inputs``, on the CPU; see :func:`onnx_latencies`."""
    return min(onnx_latencies([path], inputs, repeats=repeats, threads=threads)[0])


def onnx_latencies(
    paths: Sequence[str | Path], inputs: Inputs, *, repeats: int = 30, threads: int = 1
) -> list[list[float]]:
    """Seconds that ONNX Runtime takes for ``inputs`` with each file, in turns: what slows the machine slows them all.

    Args:
        paths: Files of networks that read the same.
        inputs: One batch.
        repeats: Runs of each that are timed, at least 1, after three that are not.
        threads: Of the runtime.

    Returns:
        ``repeats`` times for each file; the i-th of all files were taken one after the other.

    Raises:
        ValueError: If ``repeats`` is less than 1.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    sessions = [_session(path, threads=threads) for path in paths]
    feeds = [_feeds(session, inputs) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(3 + repeats):
        for session, feed, taken in zip(sessions, feeds, times, strict=True):
            start = time.perf_counter()
            session.run(None, feed)
            taken.append(time.perf_counter() - start)
    return [taken[3:] for taken in times]


def as_tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One tensor or several, as several."""
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def said(output: Any) -> Tensor:
    """The logits of what a network returns.

    Raises:
        TypeError: If there are none.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise TypeError(f"The network must return a tensor, or something with `logits`, got {type(output).__name__}.")
    return found


def _session(path: str | Path, *, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feeds(session: Any, inputs: Inputs) -> dict[str, Any]:
    if isinstance(inputs, Mapping):
        given: dict[str, Tensor] = dict(inputs)
    else:
        given = dict(zip((put.name for put in session.get_inputs()), as_tuple(inputs), strict=True))
    return {put.name: given[put.name].numpy() for put in session.get_inputs()}
