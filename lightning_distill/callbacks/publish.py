"""Publish the student while it trains, for others to follow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn

from lightning_distill.export import standalone, write_network
from lightning_distill.modules import DistillationModule
from lightning_distill.teachers.follow import LATEST, published


class PublishStudent(L.Callback):
    """Write the student's weights to a folder every so many optimizer steps, and at the end of the training.

    :class:`~lightning_distill.teachers.FollowedTeacher` in another process, or on another machine that shares the
    folder, reads them. Each version is a file ``student-<step>.safetensors`` that appears whole or not at all; then
    ``latest.json`` is replaced, which names it. The first process writes.

    Args:
        folder: Where; made if it is not there.
        every_n_steps: Optimizer steps between two versions, at least 1.
        keep: How many versions stay, at least 2: a reader may just be reading the one before.
        last: Whether to publish, and declare the last, what there is at the end of the training.

    Raises:
        ValueError: If an argument is outside its range.
        TypeError: At the start of the training, if the module is no ``DistillationModule``.
    """

    def __init__(self, folder: str, every_n_steps: int = 100, keep: int = 2, last: bool = True) -> None:
        if not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        if not keep >= 2:
            raise ValueError(f"`keep` must be at least 2 (a reader may be reading the version before), got {keep}.")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.last = last
        self._published = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there is a student."""
        if not isinstance(pl_module, DistillationModule):
            raise TypeError(
                f"PublishStudent needs a module of lightning-distill, such as KD(student, teacher), got "
                f"{type(pl_module).__name__}."
            )
        self._published = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Publish, if it is time."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._published:
            self._publish(trainer, pl_module, finished=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Publish the last version, and say that it is the last."""
        if self.last:
            self._publish(trainer, pl_module, finished=True)

    def _publish(self, trainer: L.Trainer, module: L.LightningModule, *, finished: bool) -> None:
        self._published = trainer.global_step
        if not trainer.is_global_zero:
            return
        assert isinstance(module, DistillationModule)
        with module.untapped() as student:
            network = standalone(student)
        publish(network, self.folder, trainer.global_step, finished=finished, keep=self.keep)


def publish(network: nn.Module, folder: Path, step: int, *, finished: bool, keep: int = 2) -> None:
    """Write a version of ``network`` for :class:`~lightning_distill.teachers.FollowedTeacher` to find.

    Args:
        network: As it will be read.
        folder: Of all versions.
        step: Optimizer steps of its training; its number.
        finished: Whether it is the last version.
        keep: How many versions stay.
    """
    file = folder / f"student-{step:09d}.safetensors"
    write_network(network, file, overwrite=True)
    latest = {"file": file.name, "step": step, "finished": finished}
    draft = folder / f".{LATEST}-{os.getpid()}"
    draft.write_text(json.dumps(latest))
    os.replace(draft, folder / LATEST)
    for old in published(folder)[:-keep]:
        old.unlink(missing_ok=True)
