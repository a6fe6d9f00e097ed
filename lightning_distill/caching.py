"""A teacher that is run once, where it is named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
from torch import nn

from lightning_distill.callbacks import CacheWriter
from lightning_distill.modules import TeacherPrediction
from lightning_distill.tasks import Task
from lightning_distill.teachers import CachedTeacher, FrozenTeacher, teacher_fingerprint


def run_once(
    teacher: nn.Module,
    data: L.LightningDataModule,
    folder: str | Path,
    *,
    task: Task | None = None,
    kind: Literal["top_k", "dense", "hidden"] = "top_k",
    k: int = 64,
    temperatures: Sequence[float] = (1.0, 2.0, 4.0),
    accelerator: str = "auto",
) -> CachedTeacher:
    """What ``teacher`` says about the training set of ``data``, written into ``folder`` unless it is there already.

    The command ``lightning-distill cache`` as a function: for one process, and for configurations that train a teacher
    and learn from its cache in one go, such as comparisons. What an interrupted run has written is used.

    Args:
        teacher: A network; frozen in place.
        data: With a ``predict_dataloader`` that gives the training set without random transforms.
        folder: See :class:`~lightning_distill.callbacks.CacheWriter`, as for all that follow but the last.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.
        kind: ``"top_k"``, ``"dense"`` or ``"hidden"``.
        k: Classes kept by ``"top_k"``.
        temperatures: That will be trained with.
        accelerator: Where the teacher runs, as the Trainer names it.

    Returns:
        The teacher of the student's module; it refuses other data, and other weights than these.

    Raises:
        ValueError: If there is a cache of something else in ``folder``, or as ``CacheWriter``.
    """
    frozen = FrozenTeacher(teacher)
    writer = CacheWriter(folder, kind, k, tuple(temperatures))
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        callbacks=[writer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.predict(TeacherPrediction(frozen, task), datamodule=data, return_predictions=False)
    return CachedTeacher(folder, teacher=teacher_fingerprint(frozen))
