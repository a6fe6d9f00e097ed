"""Losses on auxiliary heads: labels, teachers, and the deeper heads of the same network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from lightning_distill.losses.auxiliary_heads import AuxiliaryHeads
from lightning_distill.losses.soft_targets import Direction, SoftTargets, kl_divergence
from lightning_distill.losses.term import Term
from lightning_distill.outputs import Outputs, Step

Target = Literal["next", "deepest"]


def deep_supervision_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    r"""``sum(w_i * loss_i)`` over the classifiers of one network, auxiliary heads and, last, its own.

    Lee et al. (2015), https://arxiv.org/abs/1409.5185: the heads sit on layers ``1 … k``, and one more loss, that of
    the network's own output, belongs to the sum.

    Args:
        losses: Of each classifier, scalars or one value per item; at least one.
        weights: As many numbers, not negative.

    Returns:
        Of the losses' shape.

    Raises:
        ValueError: If there are none, or the numbers do not match.

    Example:
        >>> import torch
        >>> deep_supervision_loss([torch.tensor(2.0), torch.tensor(1.0)], [0.25, 1.0])
        tensor(1.5000)
    """
    if len(losses) == 0 or len(losses) != len(weights):
        raise ValueError(f"`weights` must have one number for each of the {len(losses)} losses, got {len(weights)}.")
    total = weights[0] * losses[0]
    for weight, loss in zip(weights[1:], losses[1:], strict=True):
        total = total + weight * loss
    return total


def layerwise_kd(
    logits: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    temperature: float | Tensor = 1.0,
    target: Target = "next",
    direction: Direction = "forward",
) -> Tensor:
    r"""Divergence of each classifier of a network from a deeper one, weighted and summed, nats times ``T ** 2``.

    .. math:: \sum_{i < k} \beta_i \, T^2 \, \mathrm{KL}(g_j \,\|\, g_i), \qquad j = i + 1 \text{ or } j = k

    The deeper side is detached: otherwise the shallow heads would pull the deep ones down to themselves. Zhang et al.
    (2019), Be Your Own Teacher, section 3.2, https://arxiv.org/abs/1905.08094, teach all from the deepest.

    Args:
        logits: Of each classifier, from the shallowest to the deepest, shape ``(items..., C)``; at least two.
        weights: ``beta`` of all but the deepest; 1 each by default.
        temperature: ``T > 0``; a number, or one value per item.
        target: Who teaches: the ``"next"`` classifier, or the ``"deepest"``.
        direction: ``"forward"`` is KL(deeper || shallower).

    Returns:
        Shape ``(items...)``, in float32 or wider.

    Raises:
        ValueError: If there are fewer than two, the weights are not one less, or ``target`` is unknown.

    Example:
        >>> import torch
        >>> layerwise_kd([torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])])
        tensor([1.5232])
    """
    if len(logits) < 2:
        raise ValueError(f"`logits` must come from at least two classifiers, got {len(logits)}.")
    weights = [1.0] * (len(logits) - 1) if weights is None else weights
    divergences = [
        kl_divergence(student, teacher, temperature=temperature, direction=direction)  # which detaches the teacher
        for student, teacher in zip(logits[:-1], _deeper(logits, target), strict=True)
    ]
    return deep_supervision_loss(divergences, weights)


class OnHeads(Term):
    """Any loss term, applied to what each auxiliary head says instead of the network, weighted and summed.

    ``OnHeads(CrossEntropy(), heads)`` is deep supervision, ``OnHeads(SoftTargets(), heads)`` lets a teacher outside the
    network teach the heads.

    Args:
        term: A loss term on logits.
        heads: The heads; several terms may hold the same.
    """

    def __init__(self, term: Term, heads: AuxiliaryHeads) -> None:
        super().__init__()
        self.term = term
        self.heads = heads
        self.needs_teacher = term.needs_teacher
        self.student_taps = (*heads.taps, *term.student_taps)
        self.teacher_taps = tuple(term.teacher_taps)

    def build(self, step: Step) -> None:
        """Make the heads, and build the term."""
        self.heads.build_for(step)
        self.term.build(step)

    def forward(self, step: Step) -> Tensor:
        """Value of each item."""
        features = step.student.features
        losses = [
            self.term(replace(step, student=Outputs(logits, features=features))) for logits in self.heads.logits(step)
        ]
        return deep_supervision_loss(losses, self.heads.weights_at(step))


class LayerwiseKD(Term):
    """Each auxiliary head learns from a deeper classifier of its network, which is detached; :func:`layerwise_kd`.

    Args:
        heads: The heads; several terms may hold the same.
        target: Who teaches a head: the ``"next"`` classifier, or the ``"deepest"``, which is the network itself.
        term: A loss term between student and teacher. Default: the forward KL divergence, at the step's temperature.

    Raises:
        ValueError: If ``target`` is unknown.
    """

    needs_teacher = False

    def __init__(self, heads: AuxiliaryHeads, target: Target = "deepest", term: Term | None = None) -> None:
        super().__init__()
        _check_target(target)
        self.heads = heads
        self.target: Target = target
        self.term = SoftTargets() if term is None else term
        self.student_taps = heads.taps

    def build(self, step: Step) -> None:
        """Make the heads."""
        self.heads.build_for(step)

    def forward(self, step: Step) -> Tensor:
        """Value of each item."""
        logits = [*self.heads.logits(step), step.student.logits]
        losses = [
            self.term(replace(step, student=Outputs(student), teacher=Outputs(teacher.detach())))
            for student, teacher in zip(logits[:-1], _deeper(logits, self.target), strict=True)
        ]
        return deep_supervision_loss(losses, self.heads.weights_at(step))


def _deeper(logits: Sequence[Tensor], target: Target) -> Sequence[Tensor]:
    """Who teaches each classifier but the deepest."""
    _check_target(target)
    return logits[1:] if target == "next" else [logits[-1]] * (len(logits) - 1)


def _check_target(target: str) -> None:
    if target not in ("next", "deepest"):
        raise ValueError(f"`target` must be 'next' or 'deepest', got {target!r}.")
