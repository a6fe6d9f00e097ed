"""What each format of a file takes: write, read again, compare, and say what came of it.

Each function writes a draft and returns a text; after an error the draft is thrown away.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from lightning_distill.cli.export.latency import REPEATS, TorchTimes, time_torch
from lightning_distill.cli.export.trained import Trained, difference
from lightning_distill.compression import block_size, read_block_sparse, write_block_sparse
from lightning_distill.export import write_network
from lightning_distill.quantization import (
    export_onnx,
    onnx_latencies,
    quantized_layers,
    read_packed,
    to_torchao,
    write_packed,
)
from lightning_distill.teachers import load_network

EXACT = 1e-4
"""Largest difference of outputs where the numbers in the file are those of the network."""
ROUNDED = 0.05
"""Where other kernels may round an input to the level beside; as :func:`export_onnx` has it."""


def write_onnx_file(trained: Trained, file: Path) -> str:
    """For ONNX Runtime; how fast it is there beside floating point."""
    inputs = trained.inputs
    dynamic = {0: "batch", 1: "length"} if trained.reads_tokens else {0: "batch"}
    report = export_onnx(trained.network, inputs, file, dynamic=dynamic, tolerance=ROUNDED)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export_onnx(trained.before(), inputs, plain, dynamic=dynamic)
        own, before = (min(times) for times in onnx_latencies([file, plain], inputs, repeats=REPEATS))
    beside = f", {own / before:.2f} of float32" if quantized_layers(trained.network) else ""
    return (
        f"in ONNX Runtime outputs differ by {report.relative_error:.2e} of their size, {report.agreement:.2%} have the "
        f"same maximum\n{1000 * own:.3f} ms for {trained.samples} inputs{beside} (ONNX Runtime, one thread, least of "
        f"{REPEATS} runs, in turns)"
    )


def write_torchao_file(trained: Trained, file: Path) -> str:
    """The state of a network whose linear layers are torchao's; how fast it is beside floating point."""
    _require_quantized(trained)
    inputs = trained.inputs
    torch.save(to_torchao(trained.network, inputs).state_dict(), file)
    network = trained.blank()
    network.load_state_dict(torch.load(file, weights_only=True), assign=True)
    error = difference(trained.output_of(network.eval()), trained.output_of(trained.network), ROUNDED)
    eager, compiled = time_torch([trained.before(), network], inputs)
    return (
        f"read again, outputs differ by {error:.2e} of their size\n"
        f"eager: {_beside(eager)}\ntorch.compile: {_beside(compiled)}\n"
        f"{trained.samples} inputs, torch {torch.__version__}, one thread, least of {REPEATS} runs, in turns"
    )


def write_packed_file(trained: Trained, file: Path) -> str:
    """Weights with as many bits as they have, for :func:`read_packed`."""
    _require_quantized(trained)
    write_packed(trained.network, file)
    error = _read_again(trained, read_packed(trained.blank(), file))
    return f"read again, outputs differ by {error:.2e} of their size. Computed in floating point, so no faster."


def write_block_sparse_file(trained: Trained, file: Path) -> str:
    """Weights without blocks of zeros, with as many bits as they have, for :func:`read_block_sparse`."""
    block = trained.block or block_size("avx512")
    report = write_block_sparse(trained.network, file, block)
    error = _read_again(trained, read_block_sparse(trained.blank(), file))
    kept, blocks = (sum(counts) for counts in zip((0, 0), *report.sparse.values(), strict=True))
    size = "x".join(map(str, block))
    again = f"read again, outputs differ by {error:.2e} of their size"
    if not blocks:
        return f"to leave out blocks of {size} would save nothing; {again}"
    beside = f", {report.ratio:.3f} of the same bits with all blocks" if quantized_layers(trained.network) else ""
    return (
        f"without {blocks - kept} of the {blocks} blocks of {size} in sparse layers{beside}; {again}. Computed with "
        "their zeros, so no faster."
    )


def write_float_file(trained: Trained, file: Path) -> str:
    """Weights in floating point, for :func:`load_network`."""
    if quantized_layers(trained.network):
        raise ValueError("the student is quantized; use the format 'packed', which holds its bits.")
    write_network(trained.network, file)
    error = _read_again(trained, load_network(trained.blank(), str(file)))
    return f"read again, outputs differ by {error:.2e} of their size"


FORMATS: dict[str, tuple[str, Callable[[Trained, Path], str]]] = {
    "onnx": (".onnx", write_onnx_file),
    "torchao": (".pt", write_torchao_file),
    "block_sparse": (".safetensors", write_block_sparse_file),
    "packed": (".safetensors", write_packed_file),
    "float": (".safetensors", write_float_file),
}
"""The ending of a file, and what writes it."""


def _require_quantized(trained: Trained) -> None:
    if not quantized_layers(trained.network):
        raise ValueError("the configuration has no quantized student; use a QADModule, or another format.")


def _read_again(trained: Trained, network: nn.Module) -> float:
    """How far the network of a file, which has the same numbers, is from the one that was written."""
    return difference(trained.said_by(network), trained.said_by(trained.network), EXACT)


def _beside(times: TorchTimes) -> str:
    if isinstance(times, str):  # why there are none
        return times
    before, own = (1000 * seconds for seconds in times)
    return f"{own:.3f} ms, {own / before:.2f} of float32 ({before:.3f} ms)"
