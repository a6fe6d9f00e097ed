"""The interface of a teacher."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import Task


class Teacher(nn.Module):
    """Anything that says something about a batch for a student to learn from.

    A teacher is called inside the training step, after the batch was moved to the device and transformed; what it
    returns has no graph.
    """

    @property
    def ready(self) -> bool:
        """Whether it has something to say already; until then, terms that compare with it contribute nothing."""
        return True

    def forward(self, batch: Any, task: Task) -> Outputs | None:
        """What the teacher says about ``batch``; the logits have the shape of the student's.

        ``None`` if it has nothing to say: outside training, where agreement with it is then not measured, and in
        training as long as it is not :attr:`ready`.
        """
        raise TypeError(f"{type(self).__name__} is a `Teacher` without a `forward(batch, task)`; define one.")

    def attach(self, student: nn.Module) -> None:
        """Learn whom it teaches; the module calls it once, before anything else. Most teachers need not know."""

    def rehearse(self, batch: Any, task: Task) -> Outputs | None:
        """Something of the shapes that it will say, also where it is not ready yet."""
        return self(batch, task)  # type: ignore[no-any-return]

    def see(self, step: Step) -> None:
        """Called after each training batch with what was said about it, for teachers that learn from the student."""

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of its own that are trained with the student, by a loss term; they join the optimizer."""
        return ()

    def copies(self) -> dict[str, nn.Module]:
        """Copies of the student that are part of this module, and so of checkpoints, by their names in it."""
        return {}

    def tap(self, names: Iterable[str]) -> None:
        """Provide the activations of these names in ``Outputs.features`` from now on.

        Raises:
            ValueError: If the teacher has none of a name.
        """
        names = list(names)
        if names:
            raise ValueError(
                f"{type(self).__name__} has no inner activations, but a loss term reads {names}. "
                "Use a teacher that is a network, or leave the term out."
            )

    def place(self, device: torch.device, mesh: DeviceMesh | None) -> None:
        """Bring weights where they will be used; called once, before the training starts.

        Args:
            device: Of this process.
            mesh: Processes that share the student's weights, if there are; by default a teacher does not take part.
        """
