"""Labels that are refined, step by step, by what the student said itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_distill.losses.soft_targets import soft_cross_entropy
from lightning_distill.losses.term import Term
from lightning_distill.outputs import Outputs, Step


class KnownOutputs(Outputs):
    """What was said about those samples of a batch about which something was said.

    Args:
        logits: Shape ``(B, C)``; see :class:`Outputs`.
        known: Which rows mean something, boolean, shape ``(B,)``.
        **more: As for :class:`Outputs`.
    """

    def __init__(self, logits: Tensor, *, known: Tensor, **more: Any) -> None:
        super().__init__(logits, **more)
        self.known = known


def refined_cross_entropy(
    hard: Tensor, student_logits: Tensor, previous_logits: Tensor, alpha: float | Tensor
) -> Tensor:
    r"""Cross-entropy with targets that mix the label and an earlier prediction, nats.

    .. math:: -\sum_c \left[ (1 - \alpha) y_c + \alpha p^{prev}_c \right] \log q_c

    Kim et al. (2021), PS-KD, https://arxiv.org/abs/2006.12000, equation 4.

    Args:
        hard: Cross-entropy with the label, of each item, shape ``(items...)``.
        student_logits: Unnormalised scores, shape ``(items..., C)``.
        previous_logits: Of the earlier prediction, same shape; detached here.
        alpha: Share of the earlier prediction in the target, in [0, 1]; a number, or one per item.

    Returns:
        Shape ``(items...)``.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 4)
        >>> refined_cross_entropy(torch.tensor([1.3863]), logits, logits, 0.5)
        tensor([1.3863])
    """
    return (1 - alpha) * hard + alpha * soft_cross_entropy(student_logits, previous_logits)


class RefinedTargets(Term):
    """The loss on labels, where a growing share of each label is what the student said an epoch ago.

    The share grows linearly from epoch to epoch, up to ``alpha`` in the last. Samples about which nothing was said
    keep their label.

    Args:
        hard: The loss on labels, one value per item.
        alpha: Share in the last epoch, in [0, 1].
        epochs: Of the training.

    Raises:
        ValueError: If ``alpha`` is outside [0, 1] or ``epochs`` is not positive.
    """

    needs_teacher = False

    def __init__(self, hard: Term, alpha: float = 0.8, epochs: int = 1) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha`, the share of the student's own prediction, must be in [0, 1], got {alpha}.")
        if not epochs >= 1:
            raise ValueError(f"`epochs` must be at least 1, got {epochs}.")
        self.hard = hard
        self.alpha = alpha
        self.epochs = epochs

    def alpha_at(self, epoch: int) -> float:
        """Share of the earlier prediction in the targets of ``epoch``, counted from 0."""
        return self.alpha * min((epoch + 1) / self.epochs, 1.0)

    def forward(self, step: Step) -> Tensor:
        """Loss of each item, nats."""
        hard: Tensor = self.hard(step)
        if not isinstance(step.teacher, KnownOutputs):
            return hard
        alpha = self.alpha_at(step.epoch) * step.teacher.known.to(hard.dtype)
        return refined_cross_entropy(hard, step.student.logits, step.teacher.logits, alpha)
