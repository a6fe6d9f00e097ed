"""Run a configuration's teacher over its training set, once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import rich
from lightning.pytorch.cli import LightningArgumentParser

from lightning_distill.callbacks import CacheWriter
from lightning_distill.cli.commands import use_configuration
from lightning_distill.cli.trainer import DistillationCLI
from lightning_distill.modules import DistillationModule, TeacherPrediction
from lightning_distill.teachers import CachedTeacher
from lightning_distill.teachers.cache import finished_ids, read_spec


class CacheCLI(DistillationCLI):
    """Reads a configuration of ``fit``, and what the cache shall be."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The options of :class:`~lightning_distill.callbacks.CacheWriter`, as ``--cache.folder``."""
        parser.add_class_arguments(CacheWriter, "cache")
        for name in ("ckpt_path", "weights_only"):  # a configuration of `fit` may have them
            parser.add_argument(f"--{name}", type=Any, default=None, help="Of `fit`; not used.")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The configuration's devices and precision, and none of its callbacks and loggers."""
        wanted = ("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins", "default_root_dir")
        configured = self._get(self.config_init, "trainer", default={})
        chosen = {name: configured[name] for name in (*wanted, "enable_progress_bar", "limit_predict_batches")}
        writer = self._get(self.config_init, "cache")
        return L.Trainer(
            **chosen, callbacks=[writer], logger=False, enable_checkpointing=False, enable_model_summary=False
        )


def run_cache(arguments: Sequence[str]) -> None:
    """Run ``cache -c CONFIG.yaml --cache.folder FOLDER``: write what the configuration's teacher says."""
    use_configuration(CacheCLI, arguments, _predict)


def _predict(cli: CacheCLI) -> None:
    model, trainer = cli.model, cli.trainer
    if not isinstance(model, DistillationModule) or model.teacher is None:
        raise ValueError(f"the configuration's {type(model).__name__} has no teacher; give it one: `model.teacher`.")
    if isinstance(model.teacher, CachedTeacher):
        raise ValueError("the configuration's teacher is a cache already; give it the network: `model.teacher`.")
    if type(cli.datamodule).predict_dataloader is L.LightningDataModule.predict_dataloader:
        raise ValueError(
            f"{type(cli.datamodule).__name__} has no `predict_dataloader`; define one that gives the training set "
            "without random transforms, with each sample's `index`."
        )
    trainer.predict(TeacherPrediction(model.teacher, model.task), datamodule=cli.datamodule, return_predictions=False)
    if trainer.is_global_zero:
        _report(cli)


def _report(cli: CacheCLI) -> None:
    folder = Path(cli.config["cache"]["folder"])
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    samples = len(finished_ids(folder, read_spec(folder)))
    rich.print(f"What the teacher says about {samples} samples is in [bold]{folder}[/bold] ({size / 2**20:.1f} MiB).")
