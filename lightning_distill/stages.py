"""The earlier stages of a pipeline, as the next one sees them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
from torch import nn

from lightning_distill.layer_maps import KeepBy, build_student, choose_layers, find_stack
from lightning_distill.tasks import Classification, Task
from lightning_distill.teachers import FollowedTeacher, FrozenTeacher, Teacher


@dataclass(frozen=True)
class Following:
    """How to follow a stage that is still being trained; see :class:`~lightning_distill.teachers.FollowedTeacher`.

    Attributes:
        folder: Where it publishes its weights.
        check_every: Training batches between two looks.
        max_age: Training batches that may be taught by one version.
        timeout: Longest wait, seconds.
    """

    folder: Path
    check_every: int = 10
    max_age: int | None = None
    timeout: float = 3600.0


@dataclass(frozen=True)
class EarlierStage:
    """A stage before.

    Attributes:
        name: Of the stage.
        network: What it trained, with the weights of its best checkpoint: on the CPU, in eval mode, frozen. Shared;
            whoever trains it further takes a copy.
        metrics: Validation and test metrics of these weights, and ``"parameters"``.
        following: Set if the stage is still being trained: ``network`` then has other weights than it will have.
    """

    name: str
    network: nn.Module
    metrics: Mapping[str, float] = field(default_factory=dict)
    following: Following | None = None

    def teacher(self) -> Teacher:
        """A teacher of its own copy of the network, which follows a stage that is still being trained."""
        network = copy.deepcopy(self.network)
        if (following := self.following) is None:
            return FrozenTeacher(network)
        return FollowedTeacher(
            str(following.folder), network, following.check_every, following.max_age, following.timeout
        )

    def copied(self) -> nn.Module:
        """A copy of the network to train further, in training mode.

        Raises:
            ValueError: If the stage is still being trained.
        """
        if self.following is not None:
            raise ValueError(
                f"The stage {self.name!r} is still being trained, so that no network can be made of its own. Use "
                "`stage_teacher` for a teacher that follows it, or run the stages one after the other."
            )
        return copy.deepcopy(self.network).requires_grad_(True).train()


class Earlier(Sequence[EarlierStage]):
    """The stages before the one that is being built, in order.

    Args:
        stages: All of them.
    """

    def __init__(self, stages: Sequence[EarlierStage] = ()) -> None:
        self._stages = list(stages)

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, index: int) -> EarlierStage:  # type: ignore[override]  # no slices
        return self._stages[index]

    @property
    def first(self) -> EarlierStage:
        """The first stage: as a rule the original teacher."""
        return self._any()[0]

    @property
    def previous(self) -> EarlierStage:
        """The stage before."""
        return self._any()[-1]

    def named(self, name: str) -> EarlierStage:
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

    def _any(self) -> list[EarlierStage]:
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
    return _current().named(stage).copied()


def stage_teacher(stage: str = "previous") -> Teacher:
    """What an earlier stage of the pipeline trained, as a teacher; it follows a stage that is still being trained.

    Args:
        stage: Its name, ``"previous"`` or ``"first"``.

    Raises:
        ValueError: If there is no such stage, or no pipeline that builds one.
    """
    return _current().named(stage).teacher()


def shortened(
    layers: int | Sequence[int],
    stage: str = "previous",
    stack: str | None = None,
    *,
    by: KeepBy = "uniform",
    data: L.LightningDataModule | None = None,
    task: Task | None = None,
    batches: int = 8,
) -> nn.Module:
    """A copy of what an earlier stage trained with some of its layers only: the student starts from its teacher.

    Args:
        layers: How many to keep, or which, ascending, counted from 1.
        stage: Name of the stage, ``"previous"`` or ``"first"``.
        stack: Path of the list of layers; by default it is looked for.
        by: Which are kept where ``layers`` is a number: ``"uniform"`` for evenly spaced ones, the last among them, or
            the ones of most ``"importance"`` or ``"density"`` on ``data``; see
            :func:`~lightning_distill.layer_maps.choose_layers`.
        data: A data module of its own; its training set is measured.
        task: How its batches are read. Default :class:`~lightning_distill.tasks.Classification`.
        batches: How many batches are measured.

    Raises:
        ValueError: If the network has fewer layers, no list of layers is found, there is no such stage, or there is no
            ``data`` to measure on.
    """
    found = _current().named(stage)
    network = found.copied()
    path = find_stack(network) if stack is None else stack
    if not isinstance(layers, int):
        return build_student(network, layers, stack=path)
    if by != "uniform" and data is None:
        raise ValueError(f"`by={by!r}` measures the layers of the stage {found.name!r}: pass `data`, a data module.")
    depth = len(list(network.get_submodule(path).children()))
    if not 1 <= layers <= depth:
        raise ValueError(
            f"`layers` must be from 1 to {depth}, as many as the stage {found.name!r} has in {path!r}, got {layers}."
        )
    loader = None
    if by != "uniform" and data is not None:
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
    kept = choose_layers(
        network, layers, by, loader=loader, task=Classification() if task is None else task, stack=path, batches=batches
    )
    return build_student(network, kept, stack=path)


def _current() -> Earlier:
    earlier = current_stages()
    if earlier is None:
        raise ValueError(
            "`stage_network`, `stage_teacher` and `shortened` work where a pipeline builds a stage. Pass a network."
        )
    return earlier


__all__ = [
    "Earlier",
    "EarlierStage",
    "Following",
    "current_stages",
    "earlier_stages",
    "shortened",
    "stage_network",
    "stage_teacher",
]
