"""The student itself as its teacher, with nothing left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_distill.modes import inference
from lightning_distill.outputs import Outputs
from lightning_distill.taps import Taps
from lightning_distill.tasks import Task
from lightning_distill.teachers.teacher import Teacher


class WholeNetworkTeacher(Teacher):
    """The student as it is at this step, in eval mode and without gradients: all blocks, no dropout.

    It teaches the part of itself that a training pass draws at random
    (:class:`~lightning_distill.stochastic_depth.StochasticDepth`, dropout). It costs a forward pass and no memory for
    weights, and stands in no checkpoint.

    Args:
        student: The network that is also passed as ``student``.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "_network", student)  # it is the student's, and registered there
        self._names: tuple[str, ...] = ()

    def forward(self, batch: Any, task: Task) -> Outputs:
        """What the whole student says about ``batch``, without a graph."""
        network = self.__dict__["_network"]
        taps = Taps(network, self._names)  # for this pass only: the student's own passes go through the same modules
        try:
            with inference(network), taps.recording() as features:
                outputs = task.run(network, batch)
            outputs.features.update(features)
        finally:
            taps.remove()
        return outputs

    def tap(self, names: Iterable[str]) -> None:
        """Keep the activations of these submodules in ``Outputs.features``; replaces earlier taps."""
        taps = Taps(self.__dict__["_network"], names)  # refuses unknown names
        taps.remove()
        self._names = taps.names
