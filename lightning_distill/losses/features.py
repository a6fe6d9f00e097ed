"""Inner features of the student, brought close to those of the teacher."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.distances import DISTANCES, Distance
from lightning_distill.losses.items import per_item
from lightning_distill.losses.lazy import Lazy
from lightning_distill.losses.pairs import checked_pairs, checked_weights
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.losses.transforms import TRANSFORMS, channels_last, resize
from lightning_distill.outputs import Step


class FeatureMatching(Term):
    """Weighted sum of distances between layers of student and teacher, ``sum(w * d(T(F_S), F_T))``.

    The student's features go through a transform that is trained with it and left behind at export (FitNets, Romero et
    al. 2015, section 2.2); a transform of the teacher's side could bring the loss to zero by mapping everything to
    nothing. Maps of other sizes are brought to the teacher's first. Positions that are padding do not count.

    Args:
        pairs: Tap of the student to tap of the teacher, as ``{"blocks.1": "layer2"}``; see
            :class:`~lightning_distill.taps.Taps` for the names.
        distance: A name from :data:`DISTANCES`, or a function or module; see :data:`Distance`. A module is copied for
            each pair.
        transform: ``"linear"`` (for maps: a 1×1 convolution), ``"mlp"``, ``"identity"``, or a module from
            ``(B, *positions, d_S)`` to ``(B, *positions, d_T)``, copied for each pair.
        weights: Weight of each pair in the order of ``pairs``; by default one over their number each.
        channel_dim: Dimension of the channels in both features; by default 1 for tensors of 4 and 5 dimensions, else
            the last. 1-d convolutions need ``1``.

    Attributes:
        pair_weights: The present weight of each pair. Callbacks turn it; a pair of weight 0 is not computed.

    Raises:
        ValueError: If there are no pairs, a name is unknown, or the weights are not as many or negative.
    """

    def __init__(
        self,
        pairs: Mapping[str, str],
        distance: str | nn.Module | Distance = "mse",
        transform: Literal["linear", "mlp", "identity"] | nn.Module = "linear",
        weights: Sequence[float] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.pairs = checked_pairs(pairs)
        self.student_taps = tuple(pairs.keys())
        self.teacher_taps = tuple(pairs.values())
        self.pair_weights = checked_weights(weights, self.pairs)
        self.channel_dim = channel_dim
        self.transforms = nn.ModuleList(_transform(transform) for _ in self.pairs)
        distance = _distance(distance)
        self.distances: Any = [distance] * len(self.pairs)
        if isinstance(distance, nn.Module):
            self.distances = nn.ModuleList(copy.deepcopy(distance) for _ in self.pairs)

    def build(self, step: Step) -> None:
        """Make transforms and distances for the widths of the features of ``step``."""
        for number, (transform, distance) in enumerate(zip(self.transforms, self.distances, strict=True)):
            student, teacher = self._features(number, step)
            if isinstance(transform, Lazy):
                transform.build(student.shape, teacher.shape)
            if isinstance(distance, Lazy):
                distance.build(transform(student).shape, teacher.shape)

    def forward(self, step: Step) -> Tensor:
        """Value of each item."""
        values = [
            weight * per_item(self._compare(number, step), step) if weight else self._nothing(number, step)
            for number, weight in enumerate(self.pair_weights)
        ]
        total = values[0]
        for value in values[1:]:
            total = total + value
        return total

    def _compare(self, number: int, step: Step) -> Tensor:
        student, teacher = self._features(number, step)
        if torch.is_grad_enabled() and not student.requires_grad:
            warnings.warn(
                f"The student's features {self.pairs[number][0]!r} carry no gradient, so the term trains nothing below "
                "its transform. The layers up to there are frozen, or run under reentrant activation checkpointing "
                "(use `use_reentrant=False`).",
                stacklevel=2,
            )
        transform: Any = self.transforms[number]
        if torch.is_grad_enabled() and hasattr(transform, "fit"):
            transform.fit(student.detach(), teacher)  # closed-form transforms see both sides
        mask = step.positions
        if mask is not None and mask.shape != teacher.shape[:-1]:
            mask = None
        value: Tensor = self.distances[number](transform(student), teacher, mask)
        return value

    def _features(self, number: int, step: Step) -> tuple[Tensor, Tensor]:
        """Both sides of a pair, channels last, the student's with as many positions as the teacher's."""
        ours, theirs = self.pairs[number]
        student = channels_last(step.student.features[ours], self.channel_dim)
        teacher = channels_last(teacher_outputs(step).features[theirs].detach(), self.channel_dim)
        if student.shape[1:-1] == teacher.shape[1:-1]:
            return student, teacher
        if step.positions is not None and step.positions.shape == student.shape[:-1]:
            raise ValueError(
                f"The sequences of {ours!r} and {theirs!r} have {student.shape[1]} and {teacher.shape[1]} positions. "
                "Features along a sequence are compared position by position: give both networks the same tokens."
            )
        return resize(student, tuple(teacher.shape[1:-1])), teacher

    def _nothing(self, number: int, step: Step) -> Tensor:
        """0 with a graph to the pair's parameters: DDP waits for a gradient of each of them."""
        parameters = [*self.transforms[number].parameters()]
        if isinstance(distance := self.distances[number], nn.Module):
            parameters += distance.parameters()
        zero = 0.0 * step.student.features[self.pairs[number][0]].flatten()[0].float()
        for parameter in parameters:
            zero = zero + 0.0 * parameter.sum()
        return zero


def _transform(transform: str | nn.Module) -> nn.Module:
    if isinstance(transform, nn.Module):
        return copy.deepcopy(transform)
    if transform not in TRANSFORMS:
        raise ValueError(f"`transform` must be one of {', '.join(TRANSFORMS)}, or a module, got {transform!r}.")
    made: nn.Module = TRANSFORMS[transform]()
    return made


def _distance(distance: str | nn.Module | Distance) -> Distance:
    if isinstance(distance, str):
        if distance not in DISTANCES:
            raise ValueError(f"`distance` must be one of {', '.join(DISTANCES)}, or a function, got {distance!r}.")
        return DISTANCES[distance]
    if not callable(distance):
        raise TypeError(f"`distance` must be a name or a function of two features, got {type(distance).__name__}.")
    return distance
