"""A teacher alone, for ``Trainer.predict``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_distill.modules.arguments import build_task
from lightning_distill.outputs import Outputs
from lightning_distill.tasks import Task
from lightning_distill.teachers.build import TeacherLike, build_teacher
from lightning_distill.teachers.cached import rows_per_sample, sample_index, signature_of


@dataclass
class Prediction:
    """What a teacher said about a batch.

    Attributes:
        index: Identity of each sample in its data set, shape ``(B,)``.
        kept: What :attr:`TeacherPrediction.keep` made of the outputs; ``None`` if all samples were finished.
        lengths: Rows of each sample, shape ``(B,)``, where rows are tokens without padding; else ``None``.
        signatures: What the samples' inputs look like, shape ``(B, 4)``.
    """

    index: Tensor
    kept: Any
    lengths: Tensor | None
    signatures: Tensor | None


class TeacherPrediction(L.LightningModule):
    """Run a teacher over a data set.

    Used with :class:`~lightning_distill.callbacks.CacheWriter`, which sets the two attributes.

    Args:
        teacher: See :class:`DistillationModule`.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Attributes:
        keep: What is wanted of the outputs; by default all of them.
        finished: Ids of samples that need not be computed; a batch of them alone costs nothing.

    Raises:
        ValueError: If there is no teacher.

    Example:
        >>> from lightning_distill.callbacks import CacheWriter
        >>> trainer = L.Trainer(callbacks=[CacheWriter("caches/resnet", kind="dense")])  # doctest: +SKIP
        >>> trainer.predict(TeacherPrediction(resnet), datamodule=data, return_predictions=False)  # doctest: +SKIP
    """

    def __init__(self, teacher: TeacherLike, task: Task | None = None) -> None:
        super().__init__()
        self.task = build_task(task)
        built = build_teacher(teacher, self.task)
        if built is None:
            raise ValueError("`teacher` is None: there is nobody to say anything. Pass a network.")
        self.teacher = built
        self.keep: Callable[[Outputs], Any] = lambda outputs: outputs
        self.finished = torch.empty(0, dtype=torch.int64)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Prediction:
        """What the teacher says about one batch."""
        index = sample_index(batch, self.task)
        if torch.isin(index.cpu(), self.finished).all():
            return Prediction(index, None, None, None)
        outputs = self.teacher(batch, self.task)
        if outputs is None:
            raise ValueError(f"{type(self.teacher).__name__} has nothing to say about this batch.")
        kept = self.keep(outputs)
        return Prediction(index, kept, rows_per_sample(batch, self.task), signature_of(batch, self.task))
