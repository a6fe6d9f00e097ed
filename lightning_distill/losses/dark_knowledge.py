"""Ablations of what a teacher gives: its confidence alone, or its dark knowledge in disorder."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import kl_divergence, softened_log_softmax
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step


def confidence_weights(teacher_logits: Tensor) -> Tensor:
    r"""Share of each item by the teacher's confidence: :math:`w_b = \max_c p_{bc} / \sum_{b'} \max_c p_{b'c}`.

    Confidence-weighting by teacher max (CWTM): Furlanello et al. (2018), section 3.2,
    https://arxiv.org/abs/1805.04770. It keeps how sure the teacher is of each sample, and nothing of what it says about
    the other classes.

    Args:
        teacher_logits: Unnormalised scores, shape ``(items..., C)``.

    Returns:
        Shape ``(items...)``, sum 1, in float32 or wider.

    Example:
        >>> confidence_weights(torch.tensor([[0.0, 0.0], [100.0, 0.0]]))
        tensor([0.3333, 0.6667])
    """
    confidence = softened_log_softmax(teacher_logits.detach()).amax(dim=-1).exp()
    return confidence / confidence.sum()


def permute_other_classes(
    teacher_logits: Tensor, target: Tensor | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """The teacher's logits with those of all classes but one in random order, for each item anew.

    Dark knowledge with permuted predictions (DKPP): Furlanello et al. (2018), section 3.2. What is left is how sure the
    teacher is, and how its doubt is shaped, but not between which classes.

    Args:
        teacher_logits: Shape ``(items..., C)``.
        target: Class of each item that stays where it is, shape ``(items...)``. Default: the teacher's first choice.
        generator: Source of randomness, on the logits' device; by default torch's.

    Returns:
        Shape ``(items..., C)``.
    """
    classes = teacher_logits.shape[-1]
    target = teacher_logits.argmax(dim=-1) if target is None else target
    # Places in random order with the target's first, and the same with the others in their own order.
    noise = torch.rand(teacher_logits.shape, generator=generator, device=teacher_logits.device)
    order = torch.arange(classes, device=teacher_logits.device).expand_as(noise).float()
    first = target.unsqueeze(-1)
    shuffled = noise.scatter(-1, first, -1.0).argsort(dim=-1)
    sorted_places = order.scatter(-1, first, -1.0).argsort(dim=-1)
    return torch.empty_like(teacher_logits).scatter_(-1, sorted_places, teacher_logits.gather(-1, shuffled))


class ConfidenceWeights:
    """Rule for ``item_weights``: weigh the items of a batch by the teacher's confidence, mean 1.

    ``KD(..., alpha=1.0, item_weights={"hard": ConfidenceWeights()})`` is CWTM: labels alone, those that the teacher is
    sure of more. The mean is 1 in each batch (micro-batch, process), so that the loss of an optimizer step depends on
    how it was split.
    """

    def __call__(self, step: Step) -> Tensor:
        """One weight per item; 1 each where there is no teacher yet."""
        if step.teacher is None:
            return torch.ones((), device=step.student.logits.device)
        weights = confidence_weights(step.teacher.logits)
        return weights * weights.numel()


class PermutedTargets(Term):
    """Divergence from the teacher with the classes that it did not choose in random order (DKPP).

    To be used in place of ``"soft"``: if it helps as much, what the teacher says about the other classes did not.
    Random numbers are torch's, so that a resumed run draws the same.
    """

    def forward(self, step: Step) -> Tensor:
        """Divergence of each item, nats, times the temperature's square."""
        permuted = permute_other_classes(teacher_outputs(step).logits.detach())
        return kl_divergence(step.student.logits, permuted, temperature=step.temperature)
