"""The moving average of a student's adapter as its teacher: one copy of the base for both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.adapters import has_adapter
from lightning_distill.modes import inference
from lightning_distill.outputs import Outputs
from lightning_distill.sharding import is_sharded
from lightning_distill.taps import Taps
from lightning_distill.tasks import Task
from lightning_distill.teachers.teacher import Teacher


class AdapterEMATeacher(Teacher):
    """The student with the exponential moving average of what it trains: its adapter, not its frozen base.

    A mean teacher (Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780) that costs a forward pass and as much
    memory as the adapter. The averages are training state: they are in checkpoints, and gone at export. They are kept
    in float32 where the adapter is narrower, as small steps would be rounded away.

    :class:`~lightning_distill.callbacks.AdapterMeanTeacher` makes one and moves it after every optimizer step.

    Args:
        student: The ``peft.PeftModel`` that is also passed as ``student``; by default the module tells it.

    Attributes:
        updates: How often :meth:`update` was called.

    Raises:
        TypeError: If ``student`` has no adapter; from the module, if it was not given here.
        ValueError: If it is given here and the module's is another; if nothing of it is trained.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> student = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=1, target_modules=["0"]))
        >>> sum(average.numel() for average in AdapterEMATeacher(student).averages)
        7
    """

    _updates: Tensor

    def __init__(self, student: nn.Module | None = None) -> None:
        super().__init__()
        self.averages = nn.ParameterList()
        self.register_buffer("_updates", torch.zeros((), dtype=torch.int64))
        self._taps = Taps(nn.Module(), ())
        if student is not None:
            self.attach(student)

    @property
    def updates(self) -> int:
        """How often it was moved."""
        return int(self._updates)

    def attach(self, student: nn.Module) -> None:
        """Begin with the adapter of ``student`` as it is."""
        known = self.__dict__.get("_network")
        if known is student:
            return
        if known is not None:
            raise ValueError("This AdapterEMATeacher is of another student; make a new one, without arguments.")
        if not has_adapter(student):
            raise TypeError(
                f"`student` must be a network under an adapter, `peft.get_peft_model(base, config)`, got "
                f"{type(student).__name__}. For other students average the whole network."
            )
        object.__setattr__(self, "_network", student)  # it is the student's, and registered there
        trained = self._trained()
        if not trained:
            raise ValueError("Nothing of the student is trained, so there is nothing to average.")
        for parameter in trained:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            self.averages.append(nn.Parameter(parameter.detach().to(wide, copy=True), requires_grad=False))

    def forward(self, batch: Any, task: Task) -> Outputs:
        """What the student would say about ``batch`` with the averaged adapter, in eval mode, without a graph."""
        network = self._student()
        if is_sharded(network):
            raise ValueError(
                "The average of an adapter cannot teach a student whose weights are spread over processes "
                "(`ModelParallelStrategy`): they are gathered once for both. Use DDP, or `AdapterOffTeacher`."
            )
        with inference(network), self._in_place(), self._taps.recording() as features:
            outputs = task.run(network, batch)
        outputs.features.update(features)
        return outputs

    def tap(self, names: Iterable[str]) -> None:
        """Keep the activations of these submodules of the student in ``Outputs.features``; replaces earlier taps."""
        self._taps.remove()
        self._taps = Taps(self._student(), names)

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the averages: ``average = momentum * average + (1 - momentum) * student``.

        Args:
            momentum: In [0, 1).

        Raises:
            ValueError: If ``momentum`` is outside its range.
        """
        check_momentum(momentum)
        for average, parameter in zip(self.averages, self._trained(), strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - momentum)
        self._updates += 1

    def _student(self) -> nn.Module:
        if "_network" not in self.__dict__:
            raise ValueError(
                "This AdapterEMATeacher belongs to no student yet: pass it to a module, as `KD(student, "
                "AdapterEMATeacher())`, or name the student: `AdapterEMATeacher(student)`."
            )
        network: nn.Module = self.__dict__["_network"]
        return network

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._student().parameters() if parameter.requires_grad]

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Within this context the student's adapter has the averaged numbers; its parameters stay the same objects."""
        trained = self._trained()
        own = [parameter.data for parameter in trained]
        try:
            for parameter, average in zip(trained, self.averages, strict=True):
                parameter.data = average.data.to(parameter.dtype)
            yield
        finally:
            for parameter, data in zip(trained, own, strict=True):
                parameter.data = data


def check_momentum(momentum: float) -> None:
    """Refuse a momentum outside [0, 1)."""
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
