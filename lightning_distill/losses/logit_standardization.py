"""Logits as z-scores: the student need not copy their level and spread."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.soft_targets import SoftTargets
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Outputs, Step

EPSILON = 1e-6
"""Added to the variance of an item's logits: equal logits (a head that starts at zero) become zeros, and the gradient
is at most 1000 times that of the z-scores."""


def standardize_logits(logits: Tensor) -> Tensor:
    r"""Logits of each item with mean 0 and standard deviation 1 (over all ``C`` classes), in float32 or wider.

    .. math:: \frac{z_c - \bar z}{\sqrt{\tfrac1C \sum_k (z_k - \bar z)^2}}

    Sun et al. (2024), algorithm 1, https://arxiv.org/abs/2403.01427. (The authors' code divides the sum by ``C - 1``,
    which is the same as a temperature larger by :math:`\sqrt{C / (C - 1)}`.)

    Args:
        logits: Unnormalised scores, shape ``(items..., C)``.

    Returns:
        Same shape; zeros for logits that are all equal, and for one class. The variance is taken to be 1e-6 larger.

    Example:
        >>> standardize_logits(torch.tensor([5.0, 5.0, 7.0, 7.0]))
        tensor([-1.0000, -1.0000,  1.0000,  1.0000])
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.layer_norm(wide, wide.shape[-1:], eps=EPSILON)


class LogitStandardization(Term):
    """Any term on logits, on standardized logits: temperature then means the same for every item and network.

    Wraps another term and hands it a step in which both sides' logits are z-scores; all else stays as it is. The
    temperature of the step is the paper's base temperature (2 there, with a weight of 9 for the term).

    Args:
        term: The term on logits. Default :class:`SoftTargets`.

    Raises:
        TypeError: If ``term`` is no loss term.

    Example:
        >>> term = LogitStandardization(SoftTargets(beta=0.5))
        >>> teacher = torch.tensor([[1.0, 2.0, 4.0]])
        >>> term(Step(None, Outputs(3.0 * teacher - 5.0), Outputs(teacher))).abs() < 1e-6
        tensor([True])
    """

    def __init__(self, term: Term | None = None) -> None:
        super().__init__()
        if term is not None and not isinstance(term, Term):
            raise TypeError(f"`term` must be a loss term such as `SoftTargets()`, got {type(term).__name__}.")
        self.term = term if term is not None else SoftTargets()
        self.student_taps = tuple(self.term.student_taps)
        self.teacher_taps = tuple(self.term.teacher_taps)

    def build(self, step: Step) -> None:
        """Build the wrapped term."""
        self.term.build(step)

    def forward(self, step: Step) -> Tensor:
        """What the wrapped term says about the standardized step."""
        student, teacher = _standardized(step.student), _standardized(teacher_outputs(step))
        value: Tensor = self.term(dataclasses.replace(step, student=student, teacher=teacher))
        return value


def _standardized(outputs: Outputs) -> Outputs:
    return Outputs(standardize_logits(outputs.logits), features=outputs.features)
