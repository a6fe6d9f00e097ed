"""Information that a teacher's output holds, and that a student takes over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.contingency import contingency_table, miller_madow_bias, mutual_information
from lightning_distill.diagnostics.estimates import Verdict
from lightning_distill.diagnostics.observations import fixed_generator, float64, labelled
from lightning_distill.losses.soft_targets import softened_log_softmax


@dataclass(frozen=True)
class InformationGap:
    """What a teacher's output tells about the label beyond its decision, nats.

    Attributes:
        output_information: Mutual information of label and (discretised) output.
        decision_information: Mutual information of label and decision, the class with the highest output.
        gap: Their difference.
        null_gaps: Gaps after permuting the labels among items of equal decision, shape ``(permutations,)``; empty if
            none were asked for. Finite samples make gaps positive without any information, and these show how much.
        n: Number of items; 0 for a table of probabilities.
    """

    output_information: float
    decision_information: float
    gap: float
    null_gaps: Tensor
    n: int

    @property
    def p_value(self) -> float:
        """Share of permutations, counting the data as one, with a gap as large as the one seen; 1 if there are none."""
        as_large = int((self.null_gaps >= self.gap - 1e-12).sum())
        return (1 + as_large) / (1 + self.null_gaps.numel())

    def verdict(self, significance: float = 0.05) -> Verdict:
        """Whether the output holds information beyond the decision. Absence of evidence is no refutation."""
        return "supported" if self.p_value <= significance else "undecided"


@torch.no_grad()
def dark_information_gap(
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    bins: int = 4,
    miller_madow: bool = False,
    permutations: int = 200,
    generator: torch.Generator | None = None,
) -> InformationGap:
    r"""Information gap :math:`I(Y; Z) - I(Y; \hat Y) = I(Y; Z | \hat Y) \ge 0` of a teacher on labelled data.

    Neither term is conditioned on the input: given the input, a teacher's output is a constant and holds no
    information at all. Logits are discretised by what a soft label adds to a hard one: the decision, the runner-up,
    and the quantile of the margin between them. Coarser cells lose information, so the true gap is larger; small
    samples make it look larger than it is, which is what the permutations are for.

    Args:
        teacher_logits: Shape ``(items..., C)``, ``C >= 2``.
        labels: Class indices, shape ``(items...)``. Items labelled ``-100`` are left out.
        bins: Number of quantiles of the margin, positive.
        miller_madow: Correct the plug-in informations for the number of cells; the gap may then be negative.
        permutations: Number of permutations of the labels, not negative.
        generator: Source of randomness; by default one with a fixed seed.

    Raises:
        ValueError: If the shapes do not fit, a label is out of range, no item is labelled, or an argument is outside
            its range.
    """
    if not bins >= 1:
        raise ValueError(f"`bins` must be positive, got {bins}.")
    if not permutations >= 0:
        raise ValueError(f"`permutations` must not be negative, got {permutations}.")
    z, y = labelled("teacher_logits", teacher_logits, labels)
    n, classes = z.shape
    if classes < 2:
        raise ValueError(f"`teacher_logits` must have at least two classes, got {classes}.")
    highest, order = z.topk(2, dim=-1)
    rank = (highest[:, 0] - highest[:, 1]).argsort(stable=True).argsort()
    decision, runner_up, margin_bin = order[:, 0], order[:, 1], rank * bins // n
    cell = ((decision * classes + runner_up) * bins + margin_bin).unique(return_inverse=True)[1]

    def informations(y: Tensor) -> tuple[float, float]:
        joints = (contingency_table(y, cell, classes), contingency_table(y, decision, classes))
        output, decided = (mutual_information(joint / n) for joint in joints)
        if miller_madow:
            output, decided = output + miller_madow_bias(joints[0]), decided + miller_madow_bias(joints[1])
        return output, decided

    def permuted() -> Tensor:
        # Among items of equal decision: a null hypothesis that keeps how good the decisions are.
        shuffled = torch.randperm(n, generator=generator)
        shuffled = shuffled[decision[shuffled].argsort(stable=True)]
        result = torch.empty_like(y)
        result[decision.argsort(stable=True)] = y[shuffled]
        return result

    generator = fixed_generator(generator)
    output, decided = informations(y)
    null = []
    for _ in range(permutations):
        null_output, null_decided = informations(permuted())
        null.append(null_output - null_decided)
    return InformationGap(output, decided, output - decided, torch.tensor(null, dtype=torch.float64), n)


@torch.no_grad()
def dark_information_gap_from_joint(joint: Tensor, decisions: Tensor) -> InformationGap:
    r"""Information gap :math:`I(Y; Z) - I(Y; \hat Y)` where the joint distribution of label and output is known.

    Args:
        joint: Probabilities, shape ``(labels, outputs)``; sums to one.
        decisions: Index of the decision that each output leads to, shape ``(outputs,)``.

    Raises:
        ValueError: If the shapes do not fit or ``joint`` is no distribution.

    Example:
        >>> joint = torch.tensor([[0.4, 0.1, 0.0], [0.0, 0.1, 0.4]])
        >>> round(dark_information_gap_from_joint(joint, torch.tensor([0, 1, 1])).gap, 4)
        0.1317
    """
    table = float64(joint)
    if table.ndim != 2 or decisions.shape != table.shape[1:]:
        raise ValueError(
            "`joint` must have shape (labels, outputs) and `decisions` (outputs,), got "
            f"{tuple(joint.shape)} and {tuple(decisions.shape)}."
        )
    if not bool((table >= 0).all()) or not abs(table.sum().item() - 1) < 1e-4:
        raise ValueError(f"`joint` must hold probabilities that sum to 1, got a sum of {table.sum().item():g}.")
    table = table / table.sum()
    index = decisions.detach().cpu().long().unique(return_inverse=True)[1]
    decided = torch.zeros(len(table), int(index.max()) + 1, dtype=torch.float64).index_add_(1, index, table)
    output, decision = mutual_information(table), mutual_information(decided)
    return InformationGap(output, decision, output - decision, torch.empty(0, dtype=torch.float64), 0)


@dataclass(frozen=True)
class TransferEfficiency:
    """Share of the teacher's class information that the student's predictions hold.

    Attributes:
        joint: Mean of ``p_teacher p_student^T`` over the items, shape ``(C_teacher, C_student)``.
        mutual_information: Of that joint distribution, nats.
        teacher_entropy: Of its teacher marginal, nats.
        efficiency: Their ratio, in [0, 1]; 0 for a teacher that always says the same class.
    """

    joint: Tensor
    mutual_information: float
    teacher_entropy: float
    efficiency: float


@torch.no_grad()
def transfer_efficiency(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0
) -> TransferEfficiency:
    r"""Transfer efficiency :math:`\eta = I(J) / H(J_T)` of the joint :math:`J = E_x[p_T(\tau) \, p_S(\tau)^T]`.

    That is: draw an input, a class from the teacher, a class from the student; how much does the second say about the
    first? The efficiency falls towards 0 as the temperature grows, since the draws become uniform. (The mutual
    information of the *logits* is the same at every temperature, and their entropy may be negative, so that their
    ratio says nothing about temperature.)

    Args:
        student_logits: Shape ``(items..., C_student)``.
        teacher_logits: Shape ``(items..., C_teacher)``.
        temperature: Positive.

    Raises:
        ValueError: If the items differ or there are none, or the temperature is not positive.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1] or teacher_logits.shape[:-1].numel() == 0:
        raise ValueError(
            "`student_logits` and `teacher_logits` must be about the same items, and at least one, got shapes "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    q, p = (
        softened_log_softmax(float64(z), temperature).exp().reshape(-1, z.shape[-1])
        for z in (student_logits, teacher_logits)
    )
    joint = p.T @ q / len(p)
    information = max(mutual_information(joint), 0.0)  # rounding may leave a little below
    teacher_entropy = torch.special.entr(joint.sum(dim=1)).sum().item()
    efficiency = min(information / teacher_entropy, 1.0) if teacher_entropy > 1e-12 else 0.0
    return TransferEfficiency(joint, information, teacher_entropy, efficiency)
