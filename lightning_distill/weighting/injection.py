"""Add a share of the teacher's gradient to the student's own, aligned with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.outputs import Step
from lightning_distill.weighting.gradient_weights import GradientWeights
from lightning_distill.weighting.live import Live

Alignment = Literal["none", "direction", "projection"]
ALIGNMENTS = ("none", "direction", "projection")


def align_direction(student: Tensor, teacher: Tensor) -> Tensor:
    r"""The teacher's direction with the length of the student's gradient, :math:`\|g_s\| \, g_t / \|g_t\|`.

    Alone it forgets where the student wanted to go, and raises the student's loss where
    :math:`\langle g_s, g_t \rangle < 0`; prefer :func:`align_projection`, or add a share of it to :math:`g_s`.

    Args:
        student: Gradient of the student's own loss, flat.
        teacher: Gradient of the loss against the teacher, same shape.

    Returns:
        Same shape, float32 or wider; zeros where the teacher's gradient is zero.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> align_direction(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
        tensor([5., 0.])
    """
    ours, theirs = _wide(student, teacher)
    length = theirs.norm()
    return theirs * torch.where(length > 0, ours.norm() / length, 0.0)


def align_projection(student: Tensor, teacher: Tensor) -> Tensor:
    r"""The part of the teacher's gradient that is orthogonal to the student's.

    However much of it is added to :math:`g_s`, the inner product with :math:`g_s` stays :math:`\|g_s\|^2`: to first
    order the student's own loss falls as without. Compare PCGrad (Yu et al. 2020), which takes out conflicts only.

    Args:
        student: Gradient of the student's own loss, flat.
        teacher: Gradient of the loss against the teacher, same shape.

    Returns:
        Same shape, float32 or wider; the teacher's gradient itself where the student's is zero.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> align_projection(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
        tensor([ 0.6400, -0.4800])
    """
    ours, theirs = _wide(student, teacher)
    square = ours.square().sum()
    return theirs - torch.where(square > 0, (theirs * ours).sum() / square, 0.0) * ours


def beta_decay(progress: float, *, beta: float, gamma: float) -> float:
    r"""Share of the teacher's gradient at a time of the training: :math:`\beta_0 e^{-\gamma t / T}`.

    Args:
        progress: ``t / T``, in [0, 1].
        beta: At the beginning, not negative.
        gamma: Not negative; 0 keeps it constant.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(beta_decay(1.0, beta=0.5, gamma=2.0), 4)
        0.0677
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"`progress` must be in [0, 1], got {progress}.")
    for name, value in {"beta": beta, "gamma": gamma}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be finite and not negative, got {value}.")
    return beta * math.exp(-gamma * progress)


def injection_weights(gram: Tensor, *, beta: float, alignment: Alignment = "projection") -> tuple[float, float]:
    r"""Weights of student's and teacher's gradient in :math:`g_s + \beta \, \mathrm{align}(g_t)`.

    Both alignments lie in the plane of the two gradients, so that their inner products are all that is needed.

    Args:
        gram: Inner products of ``(g_s, g_t)``, shape ``(2, 2)``.
        beta: Share of the teacher's gradient, not negative.
        alignment: ``"none"``, ``"direction"`` (:func:`align_direction`) or ``"projection"``
            (:func:`align_projection`).

    Raises:
        ValueError: If ``alignment`` is unknown, or the shape is another.

    Example:
        >>> injection_weights(torch.tensor([[25.0, 3.0], [3.0, 1.0]]), beta=2.0)
        (0.76, 2.0)
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"`alignment` must be one of {list(ALIGNMENTS)}, got {alignment!r}.")
    if gram.shape != (2, 2):
        raise ValueError(f"`gram` must have the shape (2, 2), got {tuple(gram.shape)}.")
    (ours, between), (_, theirs) = gram.tolist()
    if alignment == "direction":
        return 1.0, beta * math.sqrt(ours / theirs) if theirs > 0 else 0.0
    if alignment == "projection" and ours > 0:
        return 1.0 - beta * between / ours, beta
    return 1.0, beta


class InjectionWeights(GradientWeights):
    r"""The gradient of the terms on labels and others, plus a share of that of the term against the teacher.

    .. math:: g = g_s + \beta_0 e^{-\gamma t / T} \, \mathrm{align}(g_t)

    :math:`g_s` is the sum of all other terms, each with its priority. The gradients are those of all parameters of the
    student, which takes one more backward pass per term. As for :class:`GradientWeights`, all processes get the same
    weights, and with ``accumulate_grad_batches`` each micro-batch has weights of its own.

    Args:
        beta: Share of the teacher's gradient at the beginning, not negative.
        gamma: How fast it falls, not negative; 0 keeps it.
        alignment: ``"none"``, ``"direction"`` or ``"projection"``; see :func:`align_direction` and
            :func:`align_projection`.
        teacher: Name of the term against the teacher.
        priorities: Constant weights of the other terms, by default 1.

    Raises:
        ValueError: If an argument is outside its range; on binding, if there is no term ``teacher``, or no other.
    """

    def __init__(
        self,
        beta: float = 0.5,
        gamma: float = 0.0,
        alignment: Alignment = "projection",
        teacher: str = "soft",
        priorities: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(exact=True, priorities=priorities or {})
        beta_decay(0.0, beta=beta, gamma=gamma)  # checks the values
        injection_weights(torch.eye(2), beta=beta, alignment=alignment)
        self.beta = beta
        self.gamma = gamma
        self.alignment: Alignment = alignment
        self.teacher = teacher
        self._share = beta

    def bind(self, terms: Sequence[str], student: nn.Module) -> None:
        """Start with the priorities, and the first share of the teacher."""
        if self.teacher not in terms:
            raise ValueError(
                f"`teacher` names the term {self.teacher!r}, which the module does not have; there are {list(terms)}. "
                "(A fused term is split by naming 'hard' and 'soft' in `weights`.)"
            )
        super().bind(terms, student)
        self.values[self.teacher] = self.beta

    def look(self, step: Step, live: Live) -> None:
        """Set the weights of this batch."""
        self._share = beta_decay(step.progress, beta=self.beta, gamma=self.gamma)
        super().look(step, live)

    def _set(self, names: list[str], gram: Tensor, losses: Tensor) -> None:
        gram = gram.double().cpu()
        if not bool(gram.isfinite().all()):
            return  # float16 has overflowed; the scaler skips this step
        own = torch.tensor([0.0 if name == self.teacher else self._priority(name) for name in names], dtype=gram.dtype)
        theirs = torch.tensor([float(name == self.teacher) for name in names], dtype=gram.dtype)
        both = torch.stack([own, theirs])
        ours, lent = injection_weights(both @ gram @ both.T, beta=self._share, alignment=self.alignment)
        self.values = {name: lent if name == self.teacher else ours * self._priority(name) for name in names}


def _wide(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"`student` and `teacher` must have the same shape, got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(wide), teacher.to(wide)


__all__ = [
    "Alignment",
    "InjectionWeights",
    "align_direction",
    "align_projection",
    "beta_decay",
    "injection_weights",
]
