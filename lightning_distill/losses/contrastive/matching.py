"""Layers of the student, made to tell samples apart as the teacher's do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.contrastive.in_batch import InfoNCE
from lightning_distill.losses.items import per_item
from lightning_distill.losses.pairs import checked_pairs, checked_weights
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.losses.transforms import channels_last
from lightning_distill.outputs import Step


class ContrastiveMatching(Term):
    """:class:`InfoNCE` between layers of student and teacher; samples of the same class are no negatives.

    It takes layers of any two widths, by a bilinear similarity, and knows the labels; without need of labels,
    ``FeatureMatching(pairs, distance=InfoNCE())`` does the same after a transform.

    Args:
        pairs: Tap of the student to tap of the teacher.
        temperature: See :func:`info_nce`.
        similarity: See :class:`InfoNCE`.
        include_positive: See :func:`info_nce`.
        gather: See :class:`InfoNCE`.
        weights: Weight of each pair in the order of ``pairs``; by default one over their number each.
        channel_dim: Dimension of the channels; by default 1 for tensors of 4 and 5 dimensions, else the last.

    Attributes:
        pair_weights: The present weight of each pair.

    Raises:
        ValueError: As :class:`InfoNCE`, or if there are no pairs or not as many weights; in the first step, if the
            labels are not one class per sample.
    """

    def __init__(
        self,
        pairs: Mapping[str, str],
        temperature: float = 0.07,
        similarity: Literal["cosine", "bilinear"] = "bilinear",
        include_positive: bool = True,
        gather: bool = True,
        weights: Sequence[float] | None = None,
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.pairs = checked_pairs(pairs)
        self.student_taps = tuple(pairs.keys())
        self.teacher_taps = tuple(pairs.values())
        self.pair_weights = checked_weights(weights, self.pairs)
        self.channel_dim = channel_dim
        self.distances = nn.ModuleList(
            InfoNCE(temperature, similarity, include_positive=include_positive, gather=gather) for _ in self.pairs
        )

    def build(self, step: Step) -> None:
        """Make the similarities for the widths of the features of ``step``."""
        for number, distance in enumerate(self.distances):
            student, teacher = self._features(number, step)
            assert isinstance(distance, InfoNCE)
            distance.build(student.shape, teacher.shape)

    def forward(self, step: Step) -> Tensor:
        """Value of each item."""
        labels = step.labels
        if labels is not None and (labels.ndim != 1 or labels.is_floating_point() or step.token_items):
            raise ValueError(
                "`ContrastiveMatching` needs labels of one class per sample, or none, got shape "
                f"{tuple(labels.shape)} of {labels.dtype}. Use `FeatureMatching(pairs, distance=InfoNCE())`."
            )
        total = torch.zeros((), device=step.student.features[self.pairs[0][0]].device)
        for number, (weight, distance) in enumerate(zip(self.pair_weights, self.distances, strict=True)):
            student, teacher = self._features(number, step)
            mask = step.positions if step.positions is not None and step.positions.shape == student.shape[:-1] else None
            # Also at weight 0: DDP waits for a gradient of each parameter, and all processes must gather.
            total = total + weight * per_item(distance(student, teacher, mask, labels), step)
        return total

    def _features(self, number: int, step: Step) -> tuple[Tensor, Tensor]:
        ours, theirs = self.pairs[number]
        student = channels_last(step.student.features[ours], self.channel_dim)
        return student, channels_last(teacher_outputs(step).features[theirs].detach(), self.channel_dim)
