"""Write a configuration's quantized student for use elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn

from lightning_distill.cli.commands import use_configuration
from lightning_distill.cli.trainer import DistillationCLI
from lightning_distill.export import standalone
from lightning_distill.modules import DistillationModule
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.quantization import (
    export_onnx,
    onnx_latencies,
    quantized_layers,
    read_packed,
    size_report,
    unprepare,
    write_packed,
)
from lightning_distill.tasks import KEPT_FROM_MODELS, Task

SAMPLES = 64
DIFFERENCE = 1e-4
"""Largest share of the outputs' size by which a packed network may differ once it is read again."""


class ExportCLI(DistillationCLI):
    """Reads a configuration of ``fit``, and what to write."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The checkpoint, the file and whether to overwrite."""
        parser.add_argument("--ckpt", type=str, required=True, help="Checkpoint of the training.")
        parser.add_argument("--path", type=str, required=True, help="What to write: ends in .onnx or .safetensors.")
        parser.add_argument("--overwrite", type=bool, default=False, help="Whether a file there may be replaced.")
        for name in ("ckpt_path", "weights_only"):  # a configuration of `fit` may have them
            parser.add_argument(f"--{name}", type=Any, default=None, help="Of `fit`; not used.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """None of the configuration's devices, callbacks and loggers: nothing is run by it."""
        return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def run_export(arguments: Sequence[str]) -> None:
    """Run ``export -c CONFIG.yaml --ckpt CHECKPOINT --path FILE``; prints size, exactness and, of ONNX, speed."""
    errors = (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError)
    use_configuration(ExportCLI, arguments, _export, errors=errors)


def _export(cli: ExportCLI) -> None:
    model, path = cli.model, Path(cli.config["path"])
    if not isinstance(model, DistillationModule) or not quantized_layers(model.student):
        raise ValueError(f"the configuration's {type(model).__name__} has no quantized student; use a QADModule.")
    if path.suffix not in (".onnx", ".safetensors"):
        raise ValueError(f"`--path` must end in '.onnx' or '.safetensors', which name the format, got {str(path)!r}.")
    _load(model, Path(cli.config["ckpt"]))
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batch = first_samples(cli.datamodule.train_dataloader(), SAMPLES)
    with model.untapped() as student:
        network = standalone(student)
    write = _write_onnx if path.suffix == ".onnx" else _write_packed
    print(write(network, path, batch, model.task, overwrite=cli.config["overwrite"]))


def _load(model: DistillationModule, path: Path) -> None:
    """Give the student its weights, steps and bits of a checkpoint."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r}.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    model.on_load_checkpoint(checkpoint)
    prefix = "student."
    stored = checkpoint.get("state_dict", {}).items()
    model.student.load_state_dict({key[len(prefix) :]: value for key, value in stored if key.startswith(prefix)})


def _write_packed(network: nn.Module, path: Path, batch: Any, task: Task, *, overwrite: bool) -> str:
    """Write packed weights, and what they say once they are read again."""
    with torch.no_grad():
        expected = task.run(network, batch).logits
        with tempfile.TemporaryDirectory() as folder:  # a file that is not exact never takes its place
            draft = Path(folder) / path.name
            write_packed(network, draft)
            found = task.run(read_packed(unprepare(standalone(network)), draft), batch).logits
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
    if not error <= DIFFERENCE:
        raise RuntimeError(f"read again, the outputs differ by {error:.3g} of their size; nothing was written.")
    write_packed(network, path, overwrite=overwrite)
    size, before = path.stat().st_size, size_report(network).float32_bytes
    return (
        f"{path}: {size:,} bytes, {size / before:.3f} of float32; read again, outputs differ by {error:.2e} of their "
        "size. Computed in floating point, so no faster."
    )


def _write_onnx(network: nn.Module, path: Path, batch: Any, task: Task, *, overwrite: bool) -> str:
    """Write a file for ONNX Runtime, and how fast it is beside one in floating point."""
    inputs: Tensor | dict[str, Tensor] = task.inputs(batch).detach().cpu()
    dynamic = {0: "batch"}
    if isinstance(batch, Mapping) and "input_ids" in batch:  # sequences of tokens, each entry of shape (B, T)
        inputs = {key: value.cpu() for key, value in batch.items() if key not in KEPT_FROM_MODELS}
        dynamic = {0: "batch", 1: "length"}
    report = export_onnx(network, inputs, path, dynamic=dynamic, overwrite=overwrite)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float.onnx"
        export_onnx(unprepare(standalone(network)), inputs, plain, dynamic=dynamic)
        own, before = onnx_latencies([path, plain], inputs)
    ratio = min(own) / min(before)
    return (
        f"{report}\n{1000 * min(own):.3f} ms for {task.batch_size(batch)} inputs, {ratio:.2f} of float32 "
        f"(ONNX Runtime, one thread, least of {len(own)} runs, in turns)"
    )
