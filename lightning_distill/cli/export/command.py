"""Write a checkpoint's student for use elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LightningArgumentParser
from torch import nn

from lightning_distill.callbacks import BlockSparsity
from lightning_distill.cli.commands import use_configuration
from lightning_distill.cli.export.formats import FORMATS
from lightning_distill.cli.export.trained import Trained
from lightning_distill.cli.trainer import DistillationCLI
from lightning_distill.compression.blocks import Block, as_block
from lightning_distill.export import standalone
from lightning_distill.files import draft_of
from lightning_distill.modules import DistillationModule
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.quantization import quantized_layers

SAMPLES = 64


class ExportCLI(DistillationCLI):
    """Reads a configuration of ``fit``, and what to write."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The checkpoint, the file, its format and whether to overwrite."""
        parser.add_argument("--ckpt", type=str, required=True, help="Checkpoint of the training.")
        parser.add_argument(
            "--path", type=str, required=True, help="What to write: ends in .onnx, .pt (torchao) or .safetensors."
        )
        parser.add_argument(
            "--format",
            type=Literal["onnx", "torchao", "block_sparse", "packed", "float"] | None,
            default=None,
            help="Default: what the ending names; of .safetensors 'block_sparse' after a training with BlockSparsity, "
            "'packed' for any other quantized student, else 'float'.",
        )
        parser.add_argument("--overwrite", type=bool, default=False, help="Whether a file there may be replaced.")
        for name in ("ckpt_path", "weights_only"):  # a configuration of `fit` may have them
            parser.add_argument(f"--{name}", type=Any, default=None, help="Of `fit`; not used.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """None of the configuration's devices, callbacks and loggers: nothing is run by it."""
        return L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)


def run_export(arguments: Sequence[str]) -> None:
    """Run ``export -c CONFIG.yaml --ckpt CHECKPOINT --path FILE``; prints size, exactness and, where known, speed."""
    errors = (ValueError, TypeError, RuntimeError, OSError, ModuleNotFoundError)
    use_configuration(ExportCLI, arguments, _export, errors=errors)


def _export(cli: ExportCLI) -> None:
    model, path = cli.model, Path(cli.config["path"])
    if not isinstance(model, DistillationModule):
        raise ValueError(f"the configuration's {type(model).__name__} has no student.")
    if path.suffix not in {suffix for suffix, _ in FORMATS.values()}:
        raise ValueError(f"`--path` must end in '.onnx', '.pt' or '.safetensors', got {str(path)!r}.")
    block = _block_of(_load(model, Path(cli.config["ckpt"])))
    with model.untapped() as student:
        network = standalone(student)
    name = cli.config["format"] or _implied_format(path, network, block)
    suffix, write = FORMATS[name]
    if path.suffix != suffix:
        raise ValueError(f"`--path` must end in {suffix!r} for the format {name!r}, got {str(path)!r}.")
    with draft_of(path, overwrite=cli.config["overwrite"]) as draft:
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        batch = first_samples(cli.datamodule.train_dataloader(), SAMPLES)
        trained = Trained(network, model.task, batch, block)
        said = write(trained, draft)
        size = draft.stat().st_size
    print(f"{path}: {size:,} bytes, {size / trained.float32_bytes:.3f} of float32; {said}")


def _load(model: DistillationModule, path: Path) -> dict[str, Any]:
    """Give the student its weights, steps and bits of a checkpoint, which is returned."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {str(path)!r}.")
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    model.on_load_checkpoint(checkpoint)
    prefix = "student."
    stored = checkpoint.get("state_dict", {}).items()
    model.student.load_state_dict({key[len(prefix) :]: value for key, value in stored if key.startswith(prefix)})
    return checkpoint


def _block_of(checkpoint: Mapping[str, Any]) -> Block | None:
    """The blocks that the student was trained without, if it was."""
    state = checkpoint.get("callbacks", {}).get(BlockSparsity.__qualname__)
    return as_block(tuple(state["block"])) if state else None


def _implied_format(path: Path, network: nn.Module, block: Block | None) -> str:
    if path.suffix != ".safetensors":
        return next(name for name, (suffix, _) in FORMATS.items() if suffix == path.suffix)
    if block is not None:
        return "block_sparse"
    return "packed" if quantized_layers(network) else "float"
