"""Losses on embeddings: towards the teacher's, and towards known similarities of pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step


def embedding_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """``1 - cos`` of each student embedding and the teacher's, in [0, 2]; computed in float32 or wider.

    For embeddings of length 1 it is half their squared distance (Reimers and Gurevych 2020, section 2, use its mean
    over the dimensions).

    Args:
        student: Shape ``(..., d)``; receives a gradient.
        teacher: Same shape; detached here.

    Returns:
        Shape ``(...)``.

    Raises:
        ValueError: If the widths differ.

    Example:
        >>> embedding_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor([1.])
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Embeddings of student and teacher must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Give the student a layer that maps to the teacher's width, or compare "
            "similarities within the batch instead: `SimilarityMatching`."
        )
    return 1 - F.cosine_similarity(_wide(student), _wide(teacher.detach()), dim=-1)


class EmbeddingDistance(Term):
    """``1 - cos`` to the teacher's embedding of the same sample; both need the same width."""

    def forward(self, step: Step) -> Tensor:
        """Value of each sample."""
        return embedding_distance(step.student.logits, teacher_outputs(step).logits)


def similarity_matching(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the cosines between each sample and the others of the batch.

    Widths may differ. Similar in spirit to similarity-preserving distillation (Tung and Mori 2019).

    Args:
        student: Shape ``(B, d_S)``; receives a gradient.
        teacher: Shape ``(B, d_T)``; detached here.

    Returns:
        One value per sample, shape ``(B,)``: the mean over the ``B - 1`` others; 0 for a batch of one.

    Example:
        >>> similarity_matching(torch.eye(2), torch.tensor([[1.0], [1.0]]))
        tensor([1., 1.])
    """
    ours, theirs = (F.normalize(_wide(e), dim=-1) for e in (student, teacher.detach()))
    difference = (ours @ ours.T - theirs @ theirs.T).square().fill_diagonal_(0)
    return difference.sum(dim=-1) / max(len(student) - 1, 1)


class SimilarityMatching(Term):
    """:func:`similarity_matching` of the embeddings; works for any widths.

    It compares samples of a micro-batch with each other, so it is exact per micro-batch, not per optimizer step.
    """

    def forward(self, step: Step) -> Tensor:
        """Value of each sample."""
        return similarity_matching(step.student.logits, teacher_outputs(step).logits)


def pair_similarity(embeddings: Tensor) -> Tensor:
    """Cosine of rows 0 and 1, 2 and 3, and so on: shape ``(B, d)`` to ``(B / 2,)``.

    Raises:
        ValueError: If the number of rows is odd.

    Example:
        >>> pair_similarity(torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        tensor([1., 0.])
    """
    if len(embeddings) % 2:
        raise ValueError(
            f"Pairs stand in rows 0 and 1, 2 and 3, …, so their number must be even, got {len(embeddings)} rows."
        )
    embeddings = _wide(embeddings)
    return F.cosine_similarity(embeddings[::2], embeddings[1::2], dim=-1)


class PairSimilarity(Term):
    """Squared difference between the cosine of a pair and its label; both rows of the pair have this value.

    Labels are one number per row, equal within a pair, NaN where there is none, which adds nothing.
    """

    needs_teacher = False

    def forward(self, step: Step) -> Tensor:
        """Value of each sample."""
        embeddings = step.student.logits
        if step.labels is None:
            return 0.0 * _wide(embeddings)[..., 0]  # keeps a graph, so that a batch without labels can be stepped on
        labels = step.labels[::2]
        wanted = torch.where(labels.isnan(), 0, labels)
        difference = torch.where(labels.isnan(), 0, pair_similarity(embeddings) - wanted)
        return difference.square().repeat_interleave(2)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
