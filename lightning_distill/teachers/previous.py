"""What the student said about each sample one epoch ago."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from lightning_distill.losses.refinement import KnownOutputs
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import Task
from lightning_distill.teachers.teacher import Teacher


class PreviousPredictions(Teacher):
    """The student's own predictions of the epoch before, sample by sample: no second network is run.

    Batches need the samples' ``index``, as the data modules of this library give it. The predictions are those of the
    training passes themselves. They take ``8 * samples * classes`` bytes on the student's device, in every process.

    Somebody must call :meth:`next_epoch`, in all processes, when an epoch is over:
    :class:`~lightning_distill.callbacks.SoftLabelRefinement` does.

    Args:
        samples: Size of the training set: every index is below it.

    Raises:
        ValueError: If ``samples`` is not positive.
    """

    def __init__(self, samples: int) -> None:
        super().__init__()
        if not samples >= 1:
            raise ValueError(f"`samples`, the size of the training set, must be at least 1, got {samples}.")
        self.samples = samples
        # No buffers: each process sees other samples, and DDP would put the first one's in place of all.
        self.previous: tuple[Tensor, Tensor] | None = None
        self.present: tuple[Tensor, Tensor] | None = None

    @property
    def ready(self) -> bool:
        """Whether an epoch is over."""
        return self.previous is not None

    def forward(self, batch: Any, task: Task) -> Outputs | None:
        """What was said one epoch ago; ``None`` outside training, and in the first epoch."""
        if not (self.training and self.previous is not None):
            return None
        index = self._checked(task.index(batch))
        logits, known = (values.to(index.device) for values in self.previous)
        self.previous = (logits, known)
        return KnownOutputs(logits[index], known=known[index])

    def see(self, step: Step) -> None:
        """Keep what the student says now."""
        index = self._checked(step.index)
        logits = step.student.logits.detach()
        if logits.ndim != 2 or len(logits) != len(index):
            raise ValueError(
                f"PreviousPredictions needs one prediction per sample, got logits of shape {tuple(logits.shape)} for "
                f"{len(index)} samples; it is for classification."
            )
        if self.present is None:
            self.present = (
                logits.new_zeros(self.samples, logits.shape[1], dtype=torch.float32),
                torch.zeros(self.samples, dtype=torch.bool, device=logits.device),
            )
        kept, seen = (values.to(logits.device) for values in self.present)
        kept[index] = logits.float()
        seen[index] = True
        self.present = (kept, seen)

    def next_epoch(self) -> None:
        """What was present becomes previous; samples that did not come keep what was known of them before."""
        self.present = merged = self.merged()
        if merged is None:
            return
        if self.previous is not None:
            logits, known = (values.to(merged[0].device) for values in self.previous)
            merged = (torch.where(merged[1].unsqueeze(1), merged[0], logits), merged[1] | known)
        self.previous, self.present = merged, None

    def merged(self) -> tuple[Tensor, Tensor] | None:
        """What all processes have kept of the present epoch; each of them must call it."""
        if self.present is None or not (distributed.is_available() and distributed.is_initialized()):
            return self.present
        kept, seen = self.present
        total, count = torch.where(seen.unsqueeze(1), kept, 0), seen.float()
        distributed.all_reduce(total)
        distributed.all_reduce(count)
        return total / count.clamp_min(1).unsqueeze(1), count > 0

    def _checked(self, index: Tensor | None) -> Tensor:
        if index is None:
            raise ValueError(
                "The batch has no `index`, by which the predictions of an epoch ago are found. Batches must be "
                "(inputs, labels, index), or mappings with 'index'."
            )
        return index.long()
