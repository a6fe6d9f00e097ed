"""Whether a configuration's student suits a machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser

from lightning_distill.cli.commands import use_configuration
from lightning_distill.cli.trainer import DistillationCLI
from lightning_distill.hardware import deployment_check
from lightning_distill.modules import DistillationModule


class CheckCLI(DistillationCLI):
    """Reads a configuration of ``fit``, and the machine that its student is meant for."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of ``check``."""
        parser.add_argument(
            "--check.target",
            type=str,
            required=True,
            help="Where it shall run: 'x86-avx512', 'arm-neon', 'cortex-a78' or 'gpu-tensor-core'.",
        )
        parser.add_argument(
            "--check.batch_sizes", type=list[int], default=[], help="Sizes of batches whose speed is measured here."
        )
        for name in ("ckpt_path", "weights_only"):  # a configuration of `fit` may have them
            parser.add_argument(f"--{name}", type=Any, default=None, help="Of `fit`; not used.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """One that nothing is run with."""
        return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)


def run_check(arguments: Sequence[str]) -> None:
    """Run ``check -c CONFIG.yaml --check.target cortex-a78``; ends with status 1 if something does not suit it."""
    use_configuration(CheckCLI, arguments, _check)


def _check(cli: CheckCLI) -> None:
    module, options = cli.model, cli.config["check"]
    if not isinstance(module, DistillationModule):
        raise ValueError(f"the configuration's {type(module).__name__} has no student.")
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    report = deployment_check(
        module.student, batch, options["target"], run=module.task.run, batch_sizes=options["batch_sizes"]
    )
    print(report)
    if not report.passed:
        sys.exit(1)
