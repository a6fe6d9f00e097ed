"""Rules with state: functions of the step that remember something from one optimizer step to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lightning_distill.outputs import Step

OverRanks = Callable[[Tensor], Tensor]


class StatefulRule(nn.Module):
    """A rule (``Step -> number, or one per item``) that changes during the training.

    A module that takes one as ``temperature`` or in ``item_weights`` registers it, so that its buffers are in the
    checkpoint and on the device, and calls :meth:`end_step` once per optimizer step. A rule that collects *sums* over
    items in ``forward``, reads only what :meth:`end_step` made of them, and collects nothing while
    ``self.training`` is False, gives the same values however a step was split over micro-batches and processes, and is
    not moved by a validation.
    """

    def forward(self, step: Step) -> Any:
        """A number, or a tensor with one per item, without a graph."""
        raise TypeError(f"{type(self).__name__} is a `StatefulRule` without a `forward(step)`; define one.")

    def end_step(self, over_ranks: OverRanks | None) -> None:
        """Take in what the micro-batches of this optimizer step gave; called just before the optimizer steps.

        Args:
            over_ranks: Mean of a tensor over the processes; ``None`` if there is one process.
        """
