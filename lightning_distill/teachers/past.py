"""The student's own past as its teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.losses.temporal import PastOutputs
from lightning_distill.modes import inference
from lightning_distill.outputs import Outputs
from lightning_distill.taps import Taps
from lightning_distill.tasks import Task, to_outputs
from lightning_distill.teachers.teacher import Teacher


class PastTeacher(Teacher):
    """The last networks that the student was: earlier generations, or snapshots of one training.

    The copies are part of the module: they are in its checkpoints, as training cannot go on without them, and every
    process has the same. No optimizer trains them, they run in eval mode, and an exported student knows nothing of
    them. Their parameters stay the same objects; :meth:`remember` changes the numbers in them.

    Several of them speak with the weighted mean of their probabilities (of their predictions in a regression); the loss
    term :class:`~lightning_distill.losses.TemporalTargets` also gets what each said.

    Args:
        student: Copied; its weights do not matter until :meth:`remember` is called.
        size: How many networks are kept, at least 1; the oldest goes first.
        weights: Weight of each in what they say, newest first, not negative, not all zero; those that are there
            share the whole weight. One with weight 0 is not run. Default: equal weights.

    Raises:
        ValueError: If ``size`` or ``weights`` is outside its range.

    Example:
        >>> teacher = PastTeacher(nn.Linear(4, 3), size=2, weights=[0.7, 0.3])
        >>> teacher.ready
        False
        >>> teacher.remember(nn.Linear(4, 3))
        >>> teacher.ready, len(teacher.members())
        (True, 1)
    """

    def __init__(self, student: nn.Module, size: int = 1, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if not size >= 1:
            raise ValueError(f"`size`, the number of networks that are kept, must be at least 1, got {size}.")
        self.weights = check_weights(weights, size)
        self.networks = nn.ModuleList(untrained_copy(student) for _ in range(size))
        self.remembered = 0  # in all, those that were overwritten included
        self._taps = [Taps(network, ()) for network in self.networks]

    @property
    def ready(self) -> bool:
        """Whether there is a past."""
        return self.remembered > 0

    def members(self) -> list[nn.Module]:
        """The networks that were remembered, newest first."""
        return [self.networks[place] for place in self._places()]

    def remember(self, student: nn.Module) -> None:
        """Copy the weights and buffers of ``student`` into the place of the oldest network."""
        copy_weights(student, self.networks[self.remembered % len(self.networks)])
        self.remembered += 1

    def forward(self, batch: Any, task: Task) -> Outputs | None:
        """What the past says about ``batch``; ``None`` while there is none."""
        if not self.ready:
            return None
        pairs = [
            (place, weight)
            for place, weight in zip(self._places(), self.weights, strict=False)  # fewer at the beginning
            if weight > 0
        ]
        said = [run_untrained(self.networks[place], batch, task, self._taps[place]) for place, _ in pairs]
        if len(said) == 1:
            return said[0]
        logits = torch.stack([outputs.logits for outputs in said])
        weights = torch.tensor([weight for _, weight in pairs], dtype=torch.float32, device=logits.device)
        weights = weights / weights.sum()
        mean = mean_prediction(logits, weights, probabilities=task.imitable)
        return PastOutputs(mean, members=logits, weights=weights, features=said[0].features)

    def rehearse(self, batch: Any, task: Task) -> Outputs:
        """What one of the copies says, whatever its weights are."""
        return run_untrained(self.networks[0], batch, task, self._taps[0])

    def copies(self) -> dict[str, nn.Module]:
        """All places, filled or not."""
        return {f"networks.{place}": network for place, network in enumerate(self.networks)}

    def tap(self, names: Iterable[str]) -> None:
        """Keep these activations, of the newest network, in ``Outputs.features``; replaces earlier taps."""
        names = tuple(names)
        for taps in self._taps:
            taps.remove()
        self._taps = [Taps(network, names) for network in self.networks]

    @contextmanager
    def untapped(self) -> Iterator[list[nn.Module]]:
        """Within this context :meth:`members` have no taps, so that they can be copied."""
        names = self._taps[0].names
        self.tap(())
        try:
            yield self.members()
        finally:
            self.tap(names)

    def get_extra_state(self) -> Tensor:
        """How many networks were remembered, for the checkpoint."""
        return torch.tensor(self.remembered)

    def set_extra_state(self, state: Tensor) -> None:
        """Put :meth:`get_extra_state` back."""
        self.remembered = int(state)

    def _places(self) -> list[int]:
        """Where the networks that were remembered stand, newest first."""
        size = len(self.networks)
        return [(self.remembered - 1 - age) % size for age in range(min(self.remembered, size))]


class MeanPrediction(nn.Module):
    """An ensemble as one network: the mean of its members' probabilities, as logarithms; or of their predictions.

    Args:
        members: Networks with the same inputs and outputs.
        probabilities: Whether outputs are logits; otherwise they are averaged as they are.
    """

    def __init__(self, members: Iterable[nn.Module], *, probabilities: bool = True) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.probabilities = probabilities

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits, shape ``(items..., C)``."""
        logits = torch.stack([to_outputs(member(*args, **kwargs)).logits for member in self.members])
        weights = logits.new_full((len(logits),), 1 / len(logits), dtype=torch.float32)
        return mean_prediction(logits, weights, probabilities=self.probabilities)


def mean_prediction(logits: Tensor, weights: Tensor, *, probabilities: bool = True) -> Tensor:
    """Weighted mean of several predictions.

    Args:
        logits: Shape ``(k, items..., C)``.
        weights: Shape ``(k,)``, sum 1, all positive.
        probabilities: Whether to average ``softmax(logits)`` and return its logarithm, or ``logits`` themselves.

    Returns:
        Shape ``(items..., C)``, float32 or wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    weights = weights.to(logits.dtype).reshape(-1, *[1] * (logits.ndim - 1))
    if not probabilities:
        return (weights * logits).sum(dim=0)
    return (logits.log_softmax(dim=-1) + weights.log()).logsumexp(dim=0)


def untrained_copy(network: nn.Module) -> nn.Module:
    """A copy of ``network`` that no optimizer trains.

    Parameters that are not trained in ``network`` itself (the base under an adapter, say) are shared, not copied: they
    cannot become different.
    """
    shared: dict[int, Any] = {id(value): value for value in network.parameters() if not value.requires_grad}
    return copy.deepcopy(network, shared).requires_grad_(False)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give ``target``, a copy of ``source``, the same parameters and buffers, in place."""
    for ours, theirs in zip(_tensors(target), _tensors(source), strict=True):
        if ours is not theirs:
            ours.copy_(theirs)


def run_untrained(network: nn.Module, batch: Any, task: Task, taps: Taps | None = None) -> Outputs:
    """What ``network`` says in eval mode and without gradients, with the activations of ``taps``.

    Its mode is switched for this call only. The Trainer may call ``train()`` whenever it likes, and does not warn of
    modules that it finds in eval mode.
    """
    with inference(network):
        if taps is None:
            return task.run(network, batch)
        with taps.recording() as features:
            outputs = task.run(network, batch)
    outputs.features.update(features)
    return outputs


def check_weights(weights: Sequence[float] | None, size: int) -> tuple[float, ...]:
    """Weights of ``size`` networks; equal ones for ``None``.

    Raises:
        ValueError: If their number is wrong, one is negative or not finite, or all are zero.
    """
    if weights is None:
        return (1.0,) * size
    if len(weights) != size:
        raise ValueError(f"`weights` must have one entry for each of the {size} networks, got {len(weights)}.")
    if not (all(0 <= weight < math.inf for weight in weights) and weights[0] > 0):
        raise ValueError(
            "`weights`, newest first, must be finite and not negative, and the first one positive (the newest network "
            f"is the only one at the beginning), got {list(weights)}."
        )
    return tuple(float(weight) for weight in weights)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
