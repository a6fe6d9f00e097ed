"""The Trainer's commands, configured by YAML and options."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import lightning as L
from lightning.pytorch.cli import LightningCLI

from lightning_distill.cli.building import ConfigurationError, build_plainly
from lightning_distill.modules.hyperparameters import built_from_configuration


class DistillationCLI(LightningCLI):
    """LightningCLI whose checkpoints hold the whole configuration, so that they rebuild student and teacher."""

    def instantiate_classes(self) -> None:
        """Build the module, the data module and the Trainer."""
        with built_from_configuration():
            build_plainly(super().instantiate_classes)


def stop(command: str, error: Exception) -> NoReturn:
    """End the program with the message of ``error``; where ``JSONARGPARSE_DEBUG`` is true, with its traceback."""
    if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
        raise error
    sys.exit(f"lightning-distill {command}: error: {error}")


def run_trainer(arguments: Sequence[str]) -> None:
    """Run one of the Trainer's methods, as ``fit -c CONFIG.yaml --model.temperature 2``."""
    # The Trainer starts the other processes of a distributed run from sys.argv.
    before = sys.argv
    sys.argv = [before[0], *arguments]
    try:
        DistillationCLI(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=42,
        )
    except ConfigurationError as error:
        stop(arguments[0], error)
    finally:
        sys.argv = before
