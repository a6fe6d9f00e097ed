"""How difficult a sample is, by what teacher and student say about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lightning_distill.curriculum import adaptive_weight
from lightning_distill.losses.soft_targets import Direction, kl_divergence
from lightning_distill.losses.term import teacher_outputs
from lightning_distill.outputs import Step
from lightning_distill.temperature import softened_entropy


class Difficulty(Protocol):
    """A function of the step that tells how difficult each of its items is (``Any`` is for the command line).

    Attributes:
        needs_student: Whether it looks at the student; else the student is not run.
    """

    @property
    def needs_student(self) -> bool:
        """See the class."""

    def __call__(self, step: Step) -> Any:
        """One value per item."""


@dataclass(frozen=True)
class TeacherEntropy:
    """Entropy of the teacher's prediction, nats, from 0 to ``log C``: hard is what the teacher is unsure of.

    It does not change during the training.

    Args:
        temperature: Of the teacher's softmax, positive.
    """

    temperature: float = 1.0
    needs_student: ClassVar[bool] = False

    def __call__(self, step: Step) -> Tensor:
        """One value per item."""
        return softened_entropy(teacher_outputs(step).logits, temperature=self.temperature)


@dataclass(frozen=True)
class TeacherDivergence:
    """KL divergence between student and teacher, nats: hard is where the student is far from the teacher now.

    It depends on the student, so it is to be refreshed during the training.

    Args:
        direction: ``"reverse"``, ``KL(student || teacher)``, or ``"forward"``.
    """

    direction: Direction = "reverse"
    needs_student: ClassVar[bool] = True

    def __call__(self, step: Step) -> Tensor:
        """One value per item."""
        return kl_divergence(step.student.logits, teacher_outputs(step).logits, direction=self.direction)


@dataclass(frozen=True)
class WeightByDifficulty:
    """Weights of items for a term: more of what is difficult and not learnt yet; see :func:`adaptive_weight`.

    Used as ``item_weights={"soft": WeightByDifficulty()}``. The weights are at least 1, so they also raise the loss.

    Args:
        alpha: How much more, not negative.
        gamma: Confidence of the student from which on an item counts as learnt, in [0, 1].
        difficulty: By default :class:`TeacherEntropy`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    alpha: float = 0.5
    gamma: float = 0.6
    difficulty: Difficulty = TeacherEntropy()

    def __post_init__(self) -> None:
        adaptive_weight(torch.zeros(1), torch.zeros(1), alpha=self.alpha, gamma=self.gamma)  # checks the values

    @torch.no_grad()
    def __call__(self, step: Step) -> Tensor:
        """One weight per item."""
        confidence = step.student.logits.float().softmax(dim=-1).amax(dim=-1)
        return adaptive_weight(self.difficulty(step), confidence, alpha=self.alpha, gamma=self.gamma)


def per_sample(values: Tensor, step: Step) -> Tensor:
    """Mean over the items of each sample, shape ``(B,)``, from one value per item.

    Args:
        values: One per item: per sample, per token that counts (see ``Step.token_items``), or ``(B, T)``.
        step: Tells which tokens belong to which sample, and which items count.
    """
    if step.token_items and step.positions is not None:
        counts = step.positions.sum(dim=1)
        owner = torch.arange(len(counts), device=values.device).repeat_interleave(counts)
        return values.new_zeros(len(counts)).index_add(0, owner, values) / counts.clamp_min(1)
    if values.ndim == 1:
        return values
    mask = torch.ones_like(values, dtype=torch.bool) if step.mask is None else step.mask
    counted = mask.flatten(1).sum(dim=1).clamp_min(1)
    return values.where(mask, 0).flatten(1).sum(dim=1) / counted


__all__ = ["Difficulty", "TeacherDivergence", "TeacherEntropy", "WeightByDifficulty", "per_sample"]
