"""What a soft label holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.diagnostics.estimates import Estimate, bootstrap_mean
from lightning_distill.diagnostics.observations import float64, labelled
from lightning_distill.losses.soft_targets import kl_divergence, soft_cross_entropy
from lightning_distill.temperature import softened_entropy

Unit = Literal["nats", "bits"]


@dataclass(frozen=True)
class CrossEntropyParts:
    """``cross_entropy = teacher_entropy + divergence``, mean over the items, nats.

    Attributes:
        cross_entropy: Of the student against the teacher's soft labels.
        teacher_entropy: The part that no student can remove.
        divergence: KL(teacher || student), 0 for a student that matches.
    """

    cross_entropy: float
    teacher_entropy: float
    divergence: float


@torch.no_grad()
def cross_entropy_parts(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0
) -> CrossEntropyParts:
    """Split the soft cross-entropy into the teacher's entropy and the divergence that training can remove.

    The entropy does not depend on the student, so that minimising the divergence is maximising the likelihood that
    the teacher expects.

    Args:
        student_logits: Shape ``(items..., C)``.
        teacher_logits: Same shape.
        temperature: Positive; the parts are not multiplied by its square.

    Raises:
        ValueError: If the shapes differ or the temperature is not positive.
    """
    student, teacher = float64(student_logits), float64(teacher_logits)
    return CrossEntropyParts(
        cross_entropy=soft_cross_entropy(student, teacher, temperature=temperature, scale_by_t2=False).mean().item(),
        teacher_entropy=softened_entropy(teacher, temperature=temperature).mean().item(),
        divergence=kl_divergence(student, teacher, temperature=temperature, scale_by_t2=False).mean().item(),
    )


@dataclass(frozen=True)
class DarkKnowledge:
    """Entropy of soft labels and its parts, one value for each labelled item.

    ``entropy = target_entropy + dark`` and ``dark = (1 - p_target) * nontarget_entropy``.

    Attributes:
        entropy: Of the whole prediction, at most ``log C``.
        target_entropy: Of the choice between the target and the rest; says how difficult the item is.
        nontarget_entropy: Of the distribution over the other classes alone; 0 where they have no probability.
        dark: What the soft label says about the other classes, weighted by how often they come up.
    """

    entropy: Tensor
    target_entropy: Tensor
    nontarget_entropy: Tensor
    dark: Tensor

    def mean(self) -> Estimate:
        """Mean of ``dark`` over the items with its 95 % bootstrap interval."""
        return bootstrap_mean(self.dark)


@torch.no_grad()
def dark_knowledge(p_teacher: Tensor, labels: Tensor, unit: Unit = "nats") -> DarkKnowledge:
    r"""What a teacher's probabilities say about the classes that an item does *not* have.

    .. math:: H(p) = H_b(p_t) + (1 - p_t) \, H(p_{\setminus t} / (1 - p_t))

    The last term is the dark knowledge. The whole entropy is no measure of it: it counts how unsure the teacher is of
    the target, and is at most ``log C``, which a hard label can carry too. The split is that of decoupled
    distillation (Zhao et al. 2022, section 3.1, https://arxiv.org/abs/2203.08679).

    Args:
        p_teacher: Probabilities, shape ``(items..., C)``; rows sum to one.
        labels: Class indices, shape ``(items...)``. Items labelled ``-100`` are left out.
        unit: ``"nats"`` or ``"bits"``.

    Returns:
        Tensors of shape ``(n,)`` for the ``n`` labelled items.

    Raises:
        ValueError: If the shapes do not fit, a row is no distribution, a label is out of range, no item is labelled,
            or the unit is unknown.

    Example:
        >>> dark_knowledge(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([0])).dark
        tensor([0.3466], dtype=torch.float64)
    """
    if unit not in ("nats", "bits"):
        raise ValueError(f"`unit` must be 'nats' or 'bits', got {unit!r}.")
    p, y = labelled("p_teacher", p_teacher, labels)
    # Also rejects NaN. The tolerance is that of probabilities that were rounded to bfloat16.
    if not bool((p >= 0).all()) or not bool(((p.sum(dim=-1) - 1).abs() < 0.02).all()):
        raise ValueError("`p_teacher` must hold probabilities that sum to 1; of logits take `.softmax(dim=-1)` first.")
    p = p / p.sum(dim=-1, keepdim=True)
    target = p.gather(-1, y[:, None])
    others = p.scatter(-1, y[:, None], 0.0)
    rest = others.sum(dim=-1, keepdim=True)  # 1 - p_target would round away what a sure teacher leaves
    nontarget = torch.special.entr(others / rest.clamp_min(torch.finfo(p.dtype).tiny)).sum(dim=-1)
    scale = 1.0 if unit == "nats" else 1 / math.log(2)
    return DarkKnowledge(
        entropy=scale * torch.special.entr(p).sum(dim=-1),
        target_entropy=scale * (torch.special.entr(target) + torch.special.entr(rest)).squeeze(-1),
        nontarget_entropy=scale * nontarget,
        dark=scale * rest.squeeze(-1) * nontarget,
    )
