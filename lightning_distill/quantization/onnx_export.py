"""Quantized networks as ONNX files, with the steps that training has found."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.files import draft_of
from lightning_distill.modes import inference
from lightning_distill.quantization.network import quantized_layers, require_in_force
from lightning_distill.quantization.onnx_graph import Graph, fold_batch_norms, quantize_convolution_biases
from lightning_distill.quantization.onnx_layers import to_onnx_layer
from lightning_distill.quantization.onnx_operators import OPSET
from lightning_distill.quantization.onnx_runtime import Inputs, as_tuple, run_onnx, said

_LARGEST = 2**31 - 1  # bytes that a file of protocol buffers holds


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how it compares with the network in torch.

    Attributes:
        path: The file.
        bytes: Its size.
        float32_bytes: Size of the network's weights and buffers in float32.
        relative_error: Root of the squared differences of the outputs over that of the outputs' squares.
        agreement: Share of the items with the same largest output.
    """

    path: Path
    bytes: int
    float32_bytes: int
    relative_error: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.bytes:,} bytes, {self.bytes / self.float32_bytes:.3f} of float32; in ONNX Runtime "
            f"outputs differ by {self.relative_error:.2e} of their size, {self.agreement:.2%} have the same maximum"
        )


def export_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: str | Path,
    *,
    dynamic: Mapping[int, str] | None = None,
    accuracy_level: int = 4,
    tolerance: float = 0.05,
    overwrite: bool = False,
) -> OnnxReport:
    """Write a network as ONNX Runtime computes it, compare the two on ``inputs``, and keep the file if they agree.

    Layers that quantize their inputs become pairs of ``QuantizeLinear`` and ``DequantizeLinear``, which runtimes turn
    into integer kernels; batch normalization behind a convolution is moved into its steps. Linear layers with
    quantized weights alone become ``MatMulNBits`` of 2, 4 or 8 bits; other layers are stored with 4 or 8 bits and
    computed in floating point. A network without quantized layers is written in floating point.

    Args:
        model: The network; it is run in eval mode and not changed. Its output is a tensor, or has ``logits``.
        inputs: One batch, on the CPU: a tensor, several, or a mapping of keyword arguments.
        path: An ``.onnx`` file.
        dynamic: Dimensions of every input that may have another size later, by their index, with their names. Default
            ``{0: "batch"}``; for token ids ``{0: "batch", 1: "length"}``.
        accuracy_level: Of ``MatMulNBits``: 4 rounds its inputs to 8 bits as they come, and is fast; 0 does not, and may
            be slower than floating point.
        tolerance: Largest relative error of the outputs on ``inputs``.
        overwrite: Whether a file at ``path`` may be replaced.

    Raises:
        FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
        ModuleNotFoundError: If the packages of the extra ``onnx`` are missing.
        RuntimeError: If the outputs differ by more than ``tolerance``. Nothing is written then.
        ValueError: If ``path`` is no such file, layers were not calibrated or their quantization is not wholly in
            force, the network has a dtype other than float32, or is too large for one file.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ValueError(f"`path` must end in '.onnx', got {str(path)!r}.")
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive, got {tolerance}.")
    if accuracy_level not in range(5):
        raise ValueError(f"`accuracy_level` must be 0 to 4, got {accuracy_level!r}.")
    _require_packages()
    _check(model)
    with draft_of(path, overwrite=overwrite) as draft:
        with inference(model):
            expected = said(_call(model, inputs))
        onnx_model = _converted(model, inputs, dynamic or {0: "batch"}, accuracy_level)
        if onnx_model.ByteSize() > _LARGEST:
            raise ValueError(f"The network takes {onnx_model.ByteSize():,} bytes; one ONNX file holds {_LARGEST:,}.")
        draft.write_bytes(onnx_model.SerializeToString())
        found = run_onnx(draft, inputs)
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
        if not error <= tolerance:
            raise RuntimeError(
                f"In ONNX Runtime the outputs differ by {error:.3g} of their size, more than `tolerance`, {tolerance}; "
                "nothing was written. Weights of few bits are more exact with `accuracy_level=0`."
            )
    return OnnxReport(
        path=path,
        bytes=path.stat().st_size,
        float32_bytes=_float32_bytes(model),
        relative_error=error,
        agreement=float((found.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()),
    )


def _converted(model: nn.Module, inputs: Inputs, dynamic: Mapping[int, str], accuracy_level: int) -> Any:
    network = copy.deepcopy(model).eval()
    for name, layer in quantized_layers(network).items():
        to_onnx_layer(layer, name, accuracy_level=accuracy_level)
    names = list(inputs) if isinstance(inputs, Mapping) else []
    args: tuple[Tensor, ...] = tuple(inputs.values()) if isinstance(inputs, Mapping) else as_tuple(inputs)
    dimensions = {index: torch.export.Dim(name) for index, name in dynamic.items()}
    with torch.no_grad(), _quiet_exporter():
        program = torch.onnx.export(
            _OneOutput(network, names).eval(),
            args,
            dynamo=True,
            opset_version=OPSET,
            input_names=names or ([f"input_{i}" for i in range(len(args))] if len(args) > 1 else ["input"]),
            output_names=["logits"],
            dynamic_shapes=(tuple(dimensions for _ in args),),
            verbose=False,
        )
    assert program is not None
    onnx_model = program.model_proto
    graph = Graph(onnx_model)
    fold_batch_norms(graph)
    quantize_convolution_biases(graph)
    graph.write_back()
    return onnx_model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without what the exporter says of operations that nobody uses here, and of its own inside."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "# The axis name")  # several inputs have one batch dimension
            warnings.filterwarnings("ignore", ".*treespec", FutureWarning)
            yield
    finally:
        logger.setLevel(before)


class _OneOutput(nn.Module):
    """The network with positional inputs; ``names`` are those of its keyword arguments, if it takes such."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *inputs: Tensor) -> Tensor:
        if self.names:
            return said(self.network(**dict(zip(self.names, inputs, strict=True))))
        return said(self.network(*inputs))


def _call(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def _check(model: nn.Module) -> None:
    require_in_force(model)
    kinds = {tensor.dtype for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()}
    if kinds - {torch.float32}:
        raise ValueError(
            f"The network has numbers of {sorted(str(kind) for kind in kinds)}; kernels on the CPU compute in float32. "
            "Call `model.float()` first."
        )


def _float32_bytes(model: nn.Module) -> int:
    from lightning_distill.quantization.size import size_report

    if quantized_layers(model):
        return size_report(model).float32_bytes
    return 4 * sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def _require_packages() -> None:
    import importlib.util

    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"ONNX files need {', '.join(missing)}: `pip install lightning-distill[onnx]`.")
    if not hasattr(torch.onnx, "ops"):
        raise ModuleNotFoundError(f"ONNX files of quantized networks need torch 2.8 or newer, not {torch.__version__}.")
