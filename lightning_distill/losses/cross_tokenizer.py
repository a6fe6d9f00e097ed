"""Distillation between models with different tokenizers, and so with different vocabularies."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.soft_targets import softened_log_softmax
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step


def universal_logit_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
) -> Tensor:
    r"""L1 distance between the sorted probabilities of student ``q`` and teacher ``p``, of each item.

    .. math:: \sum_i \left| q_{(i)} - p_{(i)} \right|, \qquad q_{(1)} \ge q_{(2)} \ge \dots

    where the smaller vocabulary is filled up with zeros. It is the Wasserstein-1 distance between the *values* of the
    two sets of probabilities, times their number: Boizard et al. (2024), section 3, https://arxiv.org/abs/2402.12030.

    Limits: it compares how sure the models are and how they spread the rest, never *which* tokens they mean: any
    renaming of the tokens leaves it as it is. It is a companion of a loss on labels, not a substitute. Unlike a KL
    divergence it has no factor ``T ** 2``; its gradient shrinks as ``1 / T``.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., V_s)``; the only input that gets a gradient.
        teacher_logits: Unnormalised scores, shape ``(items..., V_t)``; detached here.
        temperature: ``T > 0`` of both; a number, or one value per item.
        top_k: Compare only the ``top_k`` largest of both. It saves the sorting of large vocabularies; the result is
            smaller by at most the sum of the two tails. ``None`` compares all.

    Returns:
        Shape ``(items...)``, in [0, 2], in float32 or wider.

    Raises:
        ValueError: If the items differ, ``temperature`` is not positive and finite, or ``top_k`` is not positive.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.3, 0.1, 0.6]]).log()
        >>> universal_logit_distance(student, teacher)
        tensor([0.4000])
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise ValueError(
            f"`student_logits` have the shape {tuple(student_logits.shape)} and `teacher_logits` "
            f"{tuple(teacher_logits.shape)}; all dimensions but the last must agree. Texts that two tokenizers cut "
            "differently need `OtherTokenizerTeacher` and `TwoTokenizers`, which pair the positions."
        )
    if top_k is not None and not top_k >= 1:
        raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
    student = _sorted_probabilities(student_logits, temperature, top_k)
    teacher = _sorted_probabilities(teacher_logits.detach(), temperature, top_k)
    missing = teacher.shape[-1] - student.shape[-1]
    student, teacher = F.pad(student, (0, max(missing, 0))), F.pad(teacher, (0, max(-missing, 0)))
    return (student - teacher).abs().sum(dim=-1)


class UniversalLogitDistance(Term):
    """Universal logit distillation: the sorted probabilities of models with different vocabularies.

    See :func:`universal_logit_distance`, also for its limits. The teacher is an
    :class:`~lightning_distill.teachers.OtherTokenizerTeacher`, which speaks about the positions where both models have
    read the same text; the student's other positions count with 0. Or any teacher that reads the same tokens and has
    another set of outputs.

    Args:
        top_k: Compare only so many of the largest probabilities.

    Raises:
        ValueError: If ``top_k`` is not positive.

    Example:
        Boizard et al. add it to the loss on labels with the weight 1.5, at temperature 1::

            KD(student, OtherTokenizerTeacher(network), temperature=1.0, task=CausalLM(),
               terms={"soft": UniversalLogitDistance()}, weights={"hard": 1.0, "soft": 1.5})
    """

    def __init__(self, top_k: int | None = None) -> None:
        super().__init__()
        if top_k is not None and not top_k >= 1:
            raise ValueError(f"`top_k` must be at least 1, got {top_k}.")
        self.top_k = top_k

    def forward(self, step: Step) -> Tensor:
        """Value of each item, shape of the items."""
        teacher = teacher_outputs(step)
        aligned = teacher.features.get("aligned")
        temperature = step.temperature
        if aligned is None:
            return universal_logit_distance(
                step.student.logits, teacher.logits, temperature=temperature, top_k=self.top_k
            )
        if isinstance(temperature, Tensor) and temperature.shape == aligned.shape:
            temperature = temperature[aligned]
        distance = universal_logit_distance(
            step.student.logits[aligned], teacher.logits, temperature=temperature, top_k=self.top_k
        )
        return distance.new_zeros(aligned.shape).masked_scatter(aligned, distance)


def _sorted_probabilities(logits: Tensor, temperature: float | Tensor, top_k: int | None) -> Tensor:
    probabilities = softened_log_softmax(logits, temperature).exp()
    if top_k is not None and top_k < probabilities.shape[-1]:
        return probabilities.topk(top_k, dim=-1).values
    return probabilities.sort(dim=-1, descending=True).values
