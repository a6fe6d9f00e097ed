"""Heads of one network that learn from other heads of the same network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.losses.attention.heads import head_costs
from lightning_distill.losses.attention.rows import (
    attention_kl,
    attention_reverse_kl,
    smooth_attention,
    visible_keys,
)
from lightning_distill.losses.items import per_item
from lightning_distill.losses.pairs import checked_pairs
from lightning_distill.losses.term import Term
from lightning_distill.outputs import Step

Direction = Literal["forward", "reverse"]


def nearest_head_divergence(
    student: Tensor, teacher: Tensor, *, direction: Direction = "forward", counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """KL divergence of each head from the nearest of some other heads, nats.

    Which one is nearest, the mean over the batch tells, so that a head has one teacher. More teachers never make the
    divergence larger.

    Args:
        student: Shape ``(B, H, queries, keys)``; the only input that gets a gradient.
        teacher: Shape ``(B, H', queries, keys)``: other heads, or the divergence is 0; detached here.
        direction: ``"forward"`` is KL(teacher || student), ``"reverse"`` the other.
        counts: Which queries count for the choice, boolean, ``(B, queries)``; by default all.

    Returns:
        Values ``(B, H, queries)`` in float32 or wider, and the number of each head's teacher, ``(H,)``.

    Raises:
        ValueError: If the shapes do not fit or ``direction`` is unknown.
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
    divergence = attention_kl if direction == "forward" else attention_reverse_kl
    nearest = head_costs(student, teacher, distance=divergence, counts=counts)[0].argmin(dim=1)
    return divergence(student, teacher[:, nearest]), nearest


class AttentionSelfDistillation(Term):
    """Heads of shallow layers learn from the nearest heads of deep ones, or some heads of a layer from its others.

    Heads are often redundant (Michel et al. 2019); where some are better than others, they can teach. There is no
    teacher network: the deeper maps are detached.

    Args:
        pairs: Tap that learns to tap that teaches, both of the student, as ``{"attentions.0": "attentions.-1"}``.
        student_heads: Heads that learn; by default all.
        teacher_heads: Heads that teach; by default all. Within one layer the two must not overlap.
        direction: See :func:`nearest_head_divergence`.
        smoothing: Share of uniform attention mixed into both maps, in [0, 1).

    Raises:
        ValueError: If there are no pairs, a head would teach itself, or an argument is outside its range; in the first
            step, if there is no head of a number.

    Example:
        >>> AttentionSelfDistillation({"attentions.0": "attentions.-1"}).student_taps
        ('attentions.0', 'attentions.-1')
    """

    needs_teacher = False

    def __init__(
        self,
        pairs: Mapping[str, str],
        student_heads: Sequence[int] | None = None,
        teacher_heads: Sequence[int] | None = None,
        direction: Direction = "forward",
        smoothing: float = 1e-4,
    ) -> None:
        super().__init__()
        self.pairs = checked_pairs(pairs)
        self.student_taps = tuple(dict.fromkeys([*pairs.keys(), *pairs.values()]))
        if direction not in ("forward", "reverse"):
            raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {smoothing}.")
        self.student_heads = None if student_heads is None else tuple(student_heads)
        self.teacher_heads = None if teacher_heads is None else tuple(teacher_heads)
        self.direction: Direction = direction
        self.smoothing = smoothing
        if any(ours == theirs for ours, theirs in self.pairs):
            self._refuse_overlap()

    def forward(self, step: Step) -> Tensor:
        """Divergence of each item, mean over heads and pairs."""
        values = [per_item(self._compare(ours, theirs, step), step) for ours, theirs in self.pairs]
        return torch.stack(values).mean(dim=0)

    def _compare(self, ours: str, theirs: str, step: Step) -> Tensor:
        features = step.student.features
        if features[ours] is features[theirs]:  # two names of one layer
            self._refuse_overlap()
        student = _chosen(ours, features[ours], self.student_heads)
        teacher = _chosen(theirs, features[theirs].detach(), self.teacher_heads)
        if self.smoothing:
            visible = visible_keys(student.detach().amax(dim=1, keepdim=True), teacher.amax(dim=1, keepdim=True))
            student, teacher = (smooth_attention(s, eps=self.smoothing, visible=visible) for s in (student, teacher))
        counts = step.positions
        if counts is not None and counts.shape != (len(student), student.shape[2]):
            counts = None
        return nearest_head_divergence(student, teacher, direction=self.direction, counts=counts)[0].mean(dim=1)

    def _refuse_overlap(self) -> None:
        if self.student_heads is None or self.teacher_heads is None:
            raise ValueError(
                "A layer that teaches itself needs `student_heads` and `teacher_heads` without a common head, got "
                f"{self.student_heads} and {self.teacher_heads}: a head is nearest to itself, and the loss would be 0."
            )
        if common := sorted(set(self.student_heads) & set(self.teacher_heads)):
            raise ValueError(f"`student_heads` and `teacher_heads` share {common}, which would teach themselves.")


def _chosen(name: str, attention: Tensor, heads: Sequence[int] | None) -> Tensor:
    if heads is None:
        return attention
    if len(heads) == 0 or not all(0 <= head < attention.shape[1] for head in heads):
        raise ValueError(f"{name!r} has heads 0 to {attention.shape[1] - 1}, but {list(heads)} are asked for.")
    return attention[:, list(heads)]
