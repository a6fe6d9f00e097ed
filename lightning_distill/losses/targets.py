"""Losses on labels, and their counterparts on a teacher's predictions for real-valued outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.soft_targets import check_same_shape, wide
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import UNLABELLED, Step


def cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each item in nats, computed in float32 or wider; 0 for items labelled ``-100``.

    Label smoothing mixes the label with the uniform distribution: ``(1 - eps) * onehot + eps / C`` (Szegedy et al.
    2016, section 7). Smoothing the *teacher's* training hurts its distillation (Müller et al. 2019).

    Args:
        logits: Shape ``(items..., C)``.
        labels: Class indices of shape ``(items...)``, or class probabilities of shape ``(items..., C)``.
        label_smoothing: In [0, 1).

    Returns:
        Shape ``(items...)``.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([3, -100]))
        tensor([1.3863, 0.0000])
    """
    logits = wide(logits)
    if labels.is_floating_point():
        labels = labels.to(logits.dtype)
    if logits.ndim > 2:
        flat = logits.flatten(0, -2), labels.flatten(0, -2) if labels.is_floating_point() else labels.flatten()
        return cross_entropy(*flat, label_smoothing=label_smoothing).reshape(logits.shape[:-1])
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=UNLABELLED, label_smoothing=label_smoothing)


class CrossEntropy(Term):
    """Cross-entropy of the student against the labels; items without a label add nothing.

    Args:
        label_smoothing: Share of the label's probability that is spread over all classes, in [0, 1).

    Raises:
        ValueError: If ``label_smoothing`` is outside [0, 1).
    """

    needs_teacher = False

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    def forward(self, step: Step) -> Tensor:
        """Cross-entropy of each item, nats."""
        logits = step.student.logits
        if step.labels is None:
            return 0.0 * logits[..., 0]  # keeps a graph, so that a batch without labels can be stepped on
        return cross_entropy(logits, step.labels, label_smoothing=self.label_smoothing)


class SquaredError(Term):
    """Squared error against real-valued labels, mean over the last dimension; 0 where a label is NaN."""

    needs_teacher = False

    def forward(self, step: Step) -> Tensor:
        """Squared error of each item."""
        predictions = wide(step.student.logits)
        if step.labels is None:
            return 0.0 * predictions[..., 0]
        labelled = ~step.labels.isnan()
        difference = torch.where(labelled, predictions - step.labels, 0)
        return difference.square().mean(dim=-1)


class TeacherSquaredError(Term):
    """Squared error against the teacher's predictions or logits, mean over the last dimension.

    On logits this is logit matching, the limit of soft targets at high temperature (Hinton et al. 2015, section 2.1;
    Ba and Caruana 2014).
    """

    def forward(self, step: Step) -> Tensor:
        """Squared error of each item."""
        target = wide(teacher_outputs(step).logits.detach())
        check_same_shape(step.student.logits, target)
        return (wide(step.student.logits) - target).square().mean(dim=-1)
