"""The finished stages of a pipeline, as the next one sees them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import nn

from lightning_distill.layer_maps import build_student, find_stack, uniform_map


@dataclass(frozen=True)
class FinishedStage:
    """A stage that is done.

    Attributes:
        name: Of the stage.
        network: What it trained, with the weights of its best checkpoint: on the CPU, in eval mode. Shared; whoever
            trains it further takes a copy.
        metrics: Validation and test metrics of these weights, and ``"parameters"``.
    """

    name: str
    network: nn.Module
    metrics: Mapping[str, float] = field(default_factory=dict)


class Earlier(Sequence[FinishedStage]):
    """The stages before the one that is being built, in order.

    Args:
        stages: All of them.
    """

    def __init__(self, stages: Sequence[FinishedStage] = ()) -> None:
        self._stages = list(stages)

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, index: int) -> FinishedStage:  # type: ignore[override]  # no slices
        return self._stages[index]

    @property
    def first(self) -> FinishedStage:
        """The first stage: as a rule the original teacher."""
        return self._any()[0]

    @property
    def previous(self) -> FinishedStage:
        """The stage before."""
        return self._any()[-1]

    def named(self, name: str) -> FinishedStage:
        """The stage of this name; ``"previous"`` and ``"first"`` are known too.

        Raises:
            ValueError: If there is none.
        """
        for stage in self._any():
            if stage.name == name:
                return stage
        if name in ("previous", "first"):
            return self.previous if name == "previous" else self.first
        raise ValueError(
            f"There is no earlier stage {name!r}; there are {', '.join(repr(stage.name) for stage in self)}, and "
            "'previous' and 'first'."
        )

    def _any(self) -> list[FinishedStage]:
        if not self._stages:
            raise ValueError(
                "There is no earlier stage to take a network from. The first stage of a pipeline trains the teacher; "
                "outside a pipeline pass networks."
            )
        return self._stages


_earlier: ContextVar[Earlier | None] = ContextVar("earlier_stages", default=None)


@contextmanager
def earlier_stages(earlier: Earlier) -> Iterator[None]:
    """Within this context :func:`stage_network` and stages that are built know what came before them."""
    token = _earlier.set(earlier)
    try:
        yield
    finally:
        _earlier.reset(token)


def current_stages() -> Earlier | None:
    """The stages before the one that is being built; ``None`` outside a pipeline."""
    return _earlier.get()


def stage_network(stage: str = "previous") -> nn.Module:
    """A copy of what an earlier stage of the pipeline trained: a student to go on with, or a teacher.

    For configurations: ``teacher: {class_path: lightning_distill.stages.stage_network, init_args: {stage: teacher}}``.

    Args:
        stage: Its name, ``"previous"`` or ``"first"``.

    Raises:
        ValueError: If there is no such stage, or no pipeline that builds one.
    """
    network = copy.deepcopy(_current().named(stage).network)
    return network.requires_grad_(True).train()


def shortened(layers: int | Sequence[int], stage: str = "previous", stack: str | None = None) -> nn.Module:
    """A copy of what an earlier stage trained with some of its layers only: the student starts from its teacher.

    Args:
        layers: How many to keep, evenly spaced and the last among them; or which, ascending, counted from 1 (as
            :func:`~lightning_distill.layer_maps.importance_map` chooses them).
        stage: Name of the stage, ``"previous"`` or ``"first"``.
        stack: Path of the list of layers; by default it is looked for.

    Raises:
        ValueError: If the network has fewer layers, no list of layers is found, or there is no such stage.
    """
    found = _current().named(stage)
    path = find_stack(found.network) if stack is None else stack
    kept = layers
    if isinstance(layers, int):
        stacked: nn.Sequential | nn.ModuleList = found.network.get_submodule(path)  # type: ignore[assignment]
        if not 1 <= layers <= len(stacked):
            raise ValueError(
                f"`layers` must be from 1 to {len(stacked)}, as many as the stage {found.name!r} has in {path!r}, got "
                f"{layers}."
            )
        kept = uniform_map(layers, len(stacked)).teacher
    assert not isinstance(kept, int)
    return build_student(found.network, kept, stack=path)


def _current() -> Earlier:
    earlier = current_stages()
    if earlier is None:
        raise ValueError(
            "`stage_network` and `shortened` work where a pipeline builds a stage; elsewhere pass networks."
        )
    return earlier


__all__ = [
    "Earlier",
    "FinishedStage",
    "current_stages",
    "earlier_stages",
    "shortened",
    "stage_network",
]
