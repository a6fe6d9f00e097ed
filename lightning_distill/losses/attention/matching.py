"""Attention maps of the student, brought close to those of the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.attention.heads import assign_heads, head_costs
from lightning_distill.losses.attention.local_global import LocalGlobal
from lightning_distill.losses.attention.rows import ROW_DISTANCES, RowDistance, smooth_attention, visible_keys
from lightning_distill.losses.items import per_item
from lightning_distill.losses.lazy import Shape
from lightning_distill.losses.pairs import checked_pairs, checked_weights
from lightning_distill.losses.ranks import sum_over_ranks
from lightning_distill.losses.refreshed import Refreshed
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step

Heads = Literal["aligned", "same", "mean"]
NAMED = ROW_DISTANCES | {"local_global": LocalGlobal()}


class HeadAlignment(Refreshed):
    """The head of the teacher for each of the student's, found anew every ``every`` passes from all processes' batches.

    Args:
        every: Positive.
    """

    teacher_heads: Tensor

    def make(self, *shapes: Shape) -> None:
        """Start with each head's number, counted round where the teacher has fewer."""
        student, teacher = (shape[1] for shape in shapes)
        self.register_buffer("teacher_heads", torch.arange(student) % teacher)

    @torch.no_grad()
    def fit(
        self,
        student: Tensor,
        teacher: Tensor,
        visible: Tensor | None = None,
        *,
        distance: RowDistance,
        counts: Tensor | None,
    ) -> None:
        """Align the heads of two maps ``(B, heads, queries, keys)``; see :func:`head_costs`."""
        costs, _ = head_costs(student, teacher, visible, distance=distance, counts=counts)
        self.teacher_heads.copy_(assign_heads(sum_over_ranks(costs)))


class AttentionMatching(Term):
    """Mean distance between the attention of student and teacher, over heads and queries that count.

    Jiao et al. (2020, TinyBERT) and Wang et al. (2020, MiniLM). Each layer counts as its mean, so that weights do not
    depend on numbers of layers, heads and tokens. Keys that neither network may see (padding, the future) do not count.
    A student with dropout in its attention shows maps with holes: set that dropout to 0.

    Args:
        pairs: Tap of the student to tap of the teacher, as ``{"attentions.0": "attentions.1"}``; maps of shape
            ``(B, heads, queries, keys)``.
        distance: Between rows: ``"kl"``, ``"reverse_kl"``, ``"js"``, ``"wasserstein"``, ``"mse"``, ``"sparse"``,
            ``"local_global"``, or a function of two maps; or one of these for each pair.
        heads: ``"aligned"``: heads are paired so that the sum of their distances is least, as two networks number
            theirs differently; ``"same"``: by number; ``"mean"``: the means over all heads are compared.
        every: Forward passes in training between two alignments, positive.
        smoothing: Share of uniform attention mixed into both maps, in [0, 1); 0 leaves them as they are.
        weights: Weight of each pair in the order of ``pairs``; by default one over their number each.

    Attributes:
        pair_weights: The present weight of each pair. Callbacks turn it; a pair of weight 0 is not computed.

    Raises:
        ValueError: If an argument is unknown or outside its range; in the first step, if maps cannot be compared.
    """

    def __init__(
        self,
        pairs: Mapping[str, str],
        distance: str | RowDistance | Sequence[str | RowDistance] = "kl",
        heads: Heads = "aligned",
        every: int = 100,
        smoothing: float = 1e-4,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.pairs = checked_pairs(pairs)
        self.student_taps = tuple(pairs.keys())
        self.teacher_taps = tuple(pairs.values())
        self.pair_weights = checked_weights(weights, self.pairs)
        self.distances = _distances(distance, len(self.pairs))
        if heads not in ("aligned", "same", "mean"):
            raise ValueError(f"`heads` must be 'aligned', 'same' or 'mean', got {heads!r}.")
        if not 0 <= smoothing < 1:
            raise ValueError(f"`smoothing` must be in [0, 1), got {smoothing}.")
        self.heads: Heads = heads
        self.smoothing = smoothing
        self.alignments = nn.ModuleList(HeadAlignment(every) for _ in self.pairs if heads == "aligned")

    def build(self, step: Step) -> None:
        """Learn the numbers of heads."""
        for number, alignment in enumerate(self.alignments):
            student, teacher = self._maps(number, step)
            assert isinstance(alignment, HeadAlignment)
            alignment.build(student.shape[:2], teacher.shape[:2])

    def forward(self, step: Step) -> Tensor:
        """Distance of each item: of a token's row, or the mean over a sample's rows."""
        total = 0.0 * step.student.features[self.pairs[0][0]].flatten()[0].float()
        for number, weight in enumerate(self.pair_weights):
            if weight:
                total = total + weight * per_item(self._compare(number, step), step)
        return total

    def _compare(self, number: int, step: Step) -> Tensor:
        """One value per query, ``(B, queries)``."""
        student, teacher = self._maps(number, step)
        distance = self.distances[number]
        if self.heads == "mean":
            student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
        elif self.heads == "aligned":
            alignment = self.alignments[number]
            assert isinstance(alignment, HeadAlignment)
            if self.training and torch.is_grad_enabled() and alignment.is_due():
                counts = step.positions
                if counts is not None and counts.shape != (len(student), student.shape[2]):
                    counts = None
                alignment.fit(*self._smoothed(student.detach(), teacher), distance=distance, counts=counts)
            teacher = teacher[:, alignment.teacher_heads]
        rows: Tensor = distance(*self._smoothed(student, teacher))
        return rows.mean(dim=1)

    def _smoothed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Both maps and which keys each query may see."""
        # Any head will do to see what a mask forbids, and two networks may have different numbers of them.
        visible = visible_keys(student.detach().amax(dim=1, keepdim=True), teacher.amax(dim=1, keepdim=True))
        if self.smoothing:
            student, teacher = (smooth_attention(s, eps=self.smoothing, visible=visible) for s in (student, teacher))
        return student, teacher, visible

    def _maps(self, number: int, step: Step) -> tuple[Tensor, Tensor]:
        ours, theirs = self.pairs[number]
        student = step.student.features[ours]
        teacher = teacher_outputs(step).features[theirs].detach()
        for name, side in ((ours, student), (theirs, teacher)):
            if side.ndim != 4:
                raise ValueError(
                    f"{name!r} has the shape {tuple(side.shape)}, but attention maps have (B, heads, queries, keys). "
                    "Tap 'attentions.0' of a transformers model, or a module that returns its map."
                )
        if student.shape[2:] != teacher.shape[2:]:
            raise ValueError(
                f"The maps of {ours!r} and {theirs!r} have {tuple(student.shape[2:])} and {tuple(teacher.shape[2:])} "
                "queries and keys. Attention is compared position by position: give both networks the same tokens."
            )
        if self.heads == "same" and student.shape[1] != teacher.shape[1]:
            raise ValueError(
                f"{ours!r} has {student.shape[1]} heads and {theirs!r} {teacher.shape[1]}; use `heads='aligned'` or "
                "'mean'."
            )
        return student, teacher


def _distances(distance: str | RowDistance | Sequence[str | RowDistance], number: int) -> list[RowDistance]:
    if isinstance(distance, str) or callable(distance):
        distance = [distance] * number
    if len(distance) != number:
        raise ValueError(f"`distance` must be one, or one for each of the {number} pairs, got {len(distance)}.")
    for one in distance:
        if isinstance(one, str) and one not in NAMED:
            raise ValueError(f"`distance` must be one of {', '.join(NAMED)}, or a function, got {one!r}.")
    return [NAMED[one] if isinstance(one, str) else one for one in distance]
