"""Which head of the teacher teaches which head of the student."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.attention.rows import RowDistance, attention_kl
from lightning_distill.losses.distances.inputs import upcast, without_autocast


@torch.no_grad()
def head_costs(
    student: Tensor,
    teacher: Tensor,
    visible: Tensor | None = None,
    *,
    distance: RowDistance = attention_kl,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Distance of each head of the student from each of the teacher, summed over the rows that count.

    Args:
        student: Shape ``(B, H_S, queries, keys)``.
        teacher: Shape ``(B, H_T, queries, keys)``.
        visible: Which keys each query may see, boolean, ``(B, 1, queries, keys)``; by default all.
        distance: Between rows.
        counts: Which queries count, boolean, ``(B, queries)``; by default all.

    Returns:
        Sums ``(H_S, H_T)`` and the number of rows in each, so that processes can add up theirs.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if student.ndim != 4 or student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise ValueError(
            "Heads can be compared for maps (B, heads, queries, keys) of the same sequences, got shapes "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    student, teacher = upcast(student, teacher)
    weights = torch.ones_like(student[:, 0, :, 0]) if counts is None else counts.to(student.dtype)
    if distance is attention_kl:
        costs = _kl_costs(student, teacher, weights)
    else:  # one head of the student at a time: all pairs at once would take as many times the memory
        costs = torch.stack(
            [
                (distance(head.expand_as(teacher), teacher, visible) * weights.unsqueeze(1)).sum(dim=(0, 2))
                for head in student.split(1, dim=1)
            ]
        )
    return costs, weights.sum()


def assign_heads(costs: Tensor) -> Tensor:
    """Head of the teacher for each head of the student, with the least sum of costs (Kuhn 1955).

    Each head of the teacher teaches at most one of the student; if the student has more heads, each gets its nearest.

    Args:
        costs: Shape ``(H_S, H_T)``.

    Returns:
        Indices, shape ``(H_S,)``.

    Example:
        >>> assign_heads(torch.tensor([[1.0, 2.0, 9.0], [1.1, 9.0, 9.0], [9.0, 1.0, 3.0]]))
        tensor([1, 0, 2])
    """
    from scipy.optimize import linear_sum_assignment

    if len(costs) > costs.shape[1]:
        return costs.detach().argmin(dim=1)
    _, columns = linear_sum_assignment(costs.detach().cpu().double().nan_to_num(nan=0.0).numpy())
    return torch.as_tensor(columns, device=costs.device, dtype=torch.long)


def align_heads(
    student: Tensor, teacher: Tensor, *, distance: RowDistance = attention_kl, counts: Tensor | None = None
) -> Tensor:
    """:func:`assign_heads` by :func:`head_costs`: head of the teacher for each head of the student, ``(H_S,)``."""
    return assign_heads(head_costs(student, teacher, distance=distance, counts=counts)[0])


@without_autocast
def _kl_costs(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """As one product of matrices: the entropy of the teacher does not depend on the student's head."""
    weighted = teacher * weights[:, None, :, None]
    entropy = torch.xlogy(weighted, teacher).sum(dim=(0, 2, 3))
    log_student = student.clamp_min(torch.finfo(student.dtype).tiny).log()
    return entropy - torch.einsum("bhqk,bgqk->hg", log_student, weighted)
