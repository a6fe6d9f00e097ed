"""Maps by rule, by the importance of the teacher's layers, and by how well the layers of both fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.layer_maps.layer_map import LayerMap


def uniform_map(student_depth: int, teacher_depth: int, *, base: Literal[0, 1] = 1) -> LayerMap:
    r"""Evenly spaced layers of the teacher: :math:`\lfloor i L_T / L_S \rfloor`.

    With ``base=1`` layers count from 1 and the student's last layer learns from the teacher's last (Sun et al. 2019,
    "PKD-skip"; Jiao et al. 2020, TinyBERT). Counted from 0, the same formula starts with the teacher's first layer and
    never uses the last.

    Args:
        student_depth: ``L_S``, at least 1.
        teacher_depth: ``L_T``, at least ``L_S``.
        base: Number of the first layer in the formula. The map itself always counts from 1.

    Raises:
        ValueError: If the student is deeper than the teacher, or ``base`` is neither 0 nor 1.

    Example:
        >>> uniform_map(6, 24).teacher, uniform_map(6, 24, base=0).teacher
        ((4, 8, 12, 16, 20, 24), (1, 5, 9, 13, 17, 21))
    """
    _check_depths(student_depth, teacher_depth)
    if base not in (0, 1):
        raise ValueError(f"`base` must be 0 or 1, got {base!r}.")
    layers = [i * teacher_depth // student_depth + 1 - base for i in range(base, student_depth + base)]
    return _map(layers, student_depth, teacher_depth, "uniform" if base == 1 else "uniform, counted from 0")


def last_map(student_depth: int, teacher_depth: int, *, count: int = 1) -> LayerMap:
    """The last ``count`` layers of the student learn from the last ``count`` of the teacher ("PKD-last").

    Args:
        student_depth: Number of layers of the student.
        teacher_depth: Number of layers of the teacher.
        count: How many, at most the smaller depth.

    Raises:
        ValueError: If ``count`` is outside its range.

    Example:
        >>> list(last_map(3, 6, count=2))
        [(2, 5), (3, 6)]
    """
    if not 1 <= count <= min(student_depth, teacher_depth):
        raise ValueError(
            f"`count` must be between 1 and {min(student_depth, teacher_depth)}, the smaller depth, got {count}."
        )
    ours, theirs = (tuple(range(depth - count + 1, depth + 1)) for depth in (student_depth, teacher_depth))
    return LayerMap(ours, theirs, student_depth, teacher_depth, "last")


def all_map(student_depth: int, teacher_depth: int) -> LayerMap:
    """Every layer learns from its counterpart; for networks of equal depth.

    Raises:
        ValueError: If the depths differ.

    Example:
        >>> list(all_map(2, 2))
        [(1, 1), (2, 2)]
    """
    if student_depth != teacher_depth:
        raise ValueError(
            f"`all_map` needs networks of equal depth, got a student with {student_depth} layers and a teacher with "
            f"{teacher_depth}. Use `uniform_map`, or `monotone_map` with measured costs."
        )
    return _map(range(1, teacher_depth + 1), student_depth, teacher_depth, "all")


def importance_map(scores: Tensor | Sequence[float], student_depth: int, *, name: str = "importance") -> LayerMap:
    """The teacher's ``student_depth`` most important layers, in their order.

    Args:
        scores: Importance of each teacher layer, shape ``(L_T,)``: from :func:`taylor_importance`,
            :func:`knowledge_density` or anything else. Of equal ones the lower layer is taken.
        student_depth: Number of layers of the student, at most ``L_T``.
        name: What the scores are, for the table.

    Raises:
        ValueError: If a score is not finite, or the student is deeper than the teacher.

    Example:
        >>> importance_map([0.1, 0.9, 0.2, 0.5], 2).teacher
        (2, 4)
    """
    scores = torch.as_tensor(scores).detach().cpu()
    if scores.ndim != 1 or not scores.isfinite().all():
        raise ValueError(
            f"`scores` must be one finite number per teacher layer, got shape {tuple(scores.shape)} with "
            f"{int((~scores.isfinite()).sum())} that are not finite."
        )
    teacher_depth = len(scores)
    _check_depths(student_depth, teacher_depth)
    chosen = scores.argsort(descending=True, stable=True)[:student_depth].sort().values + 1
    return _map(chosen.tolist(), student_depth, teacher_depth, f"by {name}", scores, name)


def monotone_map(cost: Tensor, *, repeat: bool = False, name: str = "cost") -> LayerMap:
    r"""The cheapest map in which higher layers of the student learn from higher layers of the teacher.

    .. math:: D_{ij} = \min(D_{i, j-1}, \; D_{i-1, j-1} + c_{ij})

    Dynamic programming, ``O(L_S L_T)``. Without the constraint each row's smallest cost would do; see
    :func:`nearest_map`.

    Args:
        cost: Of each pair, shape ``(L_S, L_T)``, finite: :func:`fitted_cost`, or one minus
            :func:`cka_similarity`.
        repeat: Whether neighbouring layers of the student may learn from the same layer.
        name: What the costs are, for the table.

    Raises:
        ValueError: If a cost is not finite, or the student is deeper than the teacher and nothing may repeat.

    Example:
        >>> monotone_map(torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.2, 0.3]])).teacher
        (2, 3)
    """
    cost = _checked_pairs(cost, "cost")
    student_depth, teacher_depth = cost.shape
    if not repeat:
        _check_depths(student_depth, teacher_depth)
    shift = 0 if repeat else 1
    # best[i][j]: cheapest map of the first i layers into the first j
    best = [[0.0] * (teacher_depth + 1)] + [[torch.inf] * (teacher_depth + 1) for _ in range(student_depth)]
    prices = cost.tolist()
    for i in range(1, student_depth + 1):
        for j in range(1, teacher_depth + 1):
            best[i][j] = min(best[i][j - 1], best[i - 1][j - shift] + prices[i - 1][j - 1])
    layers, j = [], teacher_depth
    for i in range(student_depth, 0, -1):
        while best[i][j] == best[i][j - 1]:
            j -= 1
        layers.append(j)
        j -= shift
    return _map(layers[::-1], student_depth, teacher_depth, f"monotone, by {name}", cost, name)


def nearest_map(cost: Tensor, *, name: str = "cost") -> LayerMap:
    """The cheapest teacher layer for each layer of the student, whatever the others take; maps may cross.

    Args:
        cost: Of each pair, shape ``(L_S, L_T)``, finite.
        name: What the costs are, for the table.

    Raises:
        ValueError: If a cost is not finite.

    Example:
        >>> nearest_map(torch.tensor([[0.9, 0.1], [0.1, 0.2]])).teacher
        (2, 1)
    """
    cost = _checked_pairs(cost, "cost")
    student_depth, teacher_depth = cost.shape
    return _map((cost.argmin(dim=1) + 1).tolist(), student_depth, teacher_depth, f"nearest, by {name}", cost, name)


def cka_map(similarity: Tensor, *, monotone: bool = True) -> LayerMap:
    """The map of the largest total similarity; :func:`monotone_map` or :func:`nearest_map` of one minus it.

    Args:
        similarity: Of each pair, shape ``(L_S, L_T)``, from :func:`cka_similarity`.
        monotone: Whether higher layers must learn from higher layers.

    Raises:
        ValueError: As the maps that it uses.

    Example:
        >>> cka_map(torch.tensor([[0.9, 0.3, 0.1], [0.2, 0.8, 0.7]])).teacher
        (1, 2)
    """
    similarity = _checked_pairs(similarity, "similarity")
    chosen = monotone_map(1 - similarity) if monotone else nearest_map(1 - similarity)
    method = "monotone, by CKA" if monotone else "nearest, by CKA"
    return replace(chosen, method=method, scores=similarity, score="CKA")


def _map(
    layers: Sequence[int],
    student_depth: int,
    teacher_depth: int,
    method: str,
    scores: Tensor | None = None,
    score: str = "score",
) -> LayerMap:
    ours = tuple(range(1, student_depth + 1))
    return LayerMap(ours, tuple(layers), student_depth, teacher_depth, method, scores, score)


def _check_depths(student_depth: int, teacher_depth: int) -> None:
    if not 1 <= student_depth <= teacher_depth:
        raise ValueError(
            f"The student must have at least 1 layer and at most as many as the teacher, {teacher_depth}, got "
            f"{student_depth}; name the pairs yourself with `LayerMap`."
        )


def _checked_pairs(values: Tensor, name: str) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if values.ndim != 2 or values.numel() == 0 or not values.isfinite().all():
        raise ValueError(
            f"`{name}` must be finite numbers of shape (student layers, teacher layers), got shape "
            f"{tuple(values.shape)} with {int((~values.isfinite()).sum())} that are not finite."
        )
    return values
