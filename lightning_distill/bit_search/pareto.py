"""Several objectives at once, all to be minimised: fronts, their quality, and two ways to choose one point."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Points = Sequence[Sequence[float]] | NDArray[np.float64]


def nondominated_fronts(points: Points) -> list[list[int]]:
    """Sort points into fronts: no point of a front is beaten by another of the same or a later one.

    A point is beaten by one that is nowhere worse and somewhere better. Deb et al. (2002), section III-A
    (NSGA-II).

    Args:
        points: Shape ``(n, m)``: ``m`` objectives, all minimised.

    Returns:
        Indices of each front in rising order, the best front first.

    Raises:
        ValueError: If ``points`` is no table of numbers, or one is NaN.

    Example:
        >>> nondominated_fronts([[1, 5], [2, 3], [4, 1], [3, 4]])
        [[0, 1, 2], [3]]
    """
    values = _table(points)
    left = np.arange(len(values))
    fronts = []
    while len(left):
        among = values[left]
        no_worse = (among[:, None] <= among[None]).all(axis=2)
        better = (among[:, None] < among[None]).any(axis=2)
        beaten = (no_worse & better).any(axis=0)
        fronts.append([int(index) for index in left[~beaten]])
        left = left[beaten]
    return fronts


def pareto_front(points: Points) -> list[int]:
    """Indices of the points that no other beats, in rising order: the first of :func:`nondominated_fronts` alone.

    Tens of thousands of points are no trouble, as each is compared with the front only.

    Args:
        points: Shape ``(n, m)``: ``m`` objectives, all minimised.

    Raises:
        ValueError: As :func:`nondominated_fronts`.
    """
    values = _table(points)
    front = np.zeros((0, values.shape[1]))
    found = []
    for index in np.lexsort(values.T[::-1]):  # whoever beats a point comes before it
        point = values[index]
        if not ((front <= point).all(axis=1) & (front < point).any(axis=1)).any():
            front = np.concatenate([front, point[None]])
            found.append(int(index))
    return sorted(found)


def crowding_distance(points: Points) -> list[float]:
    """How much room each point of one front has: the sum, over objectives, of the gap between its neighbours.

    Gaps are divided by the objective's range; the ends are infinitely far. Deb et al. (2002), section III-B.

    Args:
        points: Of one front, shape ``(n, m)``.

    Raises:
        ValueError: As :func:`nondominated_fronts`.

    Example:
        >>> crowding_distance([[1, 5], [2, 3], [4, 1]])
        [inf, 2.0, inf]
    """
    values = _table(points)
    room = np.zeros(len(values))
    for column in values.T:
        order = column.argsort(kind="stable")
        spread = column[order[-1]] - column[order[0]] if len(order) else 0.0
        room[order[:1]] = room[order[-1:]] = math.inf
        if spread > 0:
            room[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / spread
    return [float(value) for value in room]


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Volume that is beaten by ``points`` and lies below ``reference``: the quality of a front, larger is better.

    Points that are not below the reference in every objective add nothing. Zitzler and Thiele (1999). Sliced along
    the last objective, so the work grows like ``n ** (m - 1)``: for two or three objectives.

    Args:
        points: Shape ``(n, m)``, all objectives minimised.
        reference: The worst that counts, shape ``(m,)``.

    Raises:
        ValueError: If ``points`` is no table of numbers with as many objectives as ``reference``.

    Example:
        >>> hypervolume([[1, 5], [2, 3], [4, 1]], [6, 6])
        17.0
    """
    worst = np.asarray(reference, dtype=np.float64)
    values = _table(points, objectives=len(worst))
    inside = values[(values < worst).all(axis=1)]
    return _volume(inside[pareto_front(inside)], worst)


def weighted_sum(points: Points, weights: Sequence[float]) -> int:
    """Index of the point with the least weighted sum of its objectives; the first, if several have it.

    With positive weights it is on the front. It is always on the front's convex hull: points in a dent are never
    found, whatever the weights are.

    Args:
        points: Shape ``(n, m)``, ``n >= 1``.
        weights: Shape ``(m,)``, not negative, not all zero.

    Raises:
        ValueError: If there are no points, or the weights are out of range.
    """
    factors = np.asarray(weights, dtype=np.float64)
    values = _some(points, objectives=len(factors))
    if not ((factors >= 0).all() and factors.sum() > 0 and np.isfinite(factors).all()):
        raise ValueError(f"`weights` must be finite, not negative and not all zero, got {list(weights)}.")
    return int((values @ factors).argmin())


def epsilon_constraint(points: Points, limits: Sequence[float | None], *, objective: int = 0) -> int:
    """Index of the point with the least ``objective`` among those within the limits of the others (Haimes 1971).

    Unlike :func:`weighted_sum` it reaches every point of the front.

    Args:
        points: Shape ``(n, m)``, ``n >= 1``.
        limits: Largest value that each objective may have, shape ``(m,)``; ``None`` for no limit.
        objective: Which is minimised.

    Raises:
        ValueError: If there are no points, or none is within the limits; the message says which is the tightest.

    Example:
        >>> epsilon_constraint([[0.3, 8], [0.34, 4], [0.5, 2]], [None, 5])
        1
    """
    values = _some(points, objectives=len(limits))
    most = np.array([math.inf if limit is None else limit for limit in limits])
    allowed = (values <= most).all(axis=1)
    if not allowed.any():
        raise ValueError(
            f"No point is within `limits` {list(limits)}: the least value of each objective is "
            f"{values.min(axis=0).tolist()}. Raise a limit."
        )
    return int(np.where(allowed, values[:, objective], math.inf).argmin())


def _volume(values: NDArray[np.float64], worst: NDArray[np.float64]) -> float:
    if len(values) == 0:
        return 0.0
    if len(worst) == 1:
        return float(worst[0] - values.min())
    order = values[values[:, -1].argsort()]
    edges = [*order[:, -1], worst[-1]]
    return sum(
        float(edges[i + 1] - edges[i]) * _volume(order[: i + 1, :-1], worst[:-1])
        for i in range(len(order))
        if edges[i + 1] > edges[i]
    )


def _some(points: Points, objectives: int) -> NDArray[np.float64]:
    values = _table(points, objectives)
    if len(values) == 0:
        raise ValueError("`points` holds no point to choose.")
    return values


def _table(points: Points, objectives: int | None = None) -> NDArray[np.float64]:
    values = np.asarray(points, dtype=np.float64)
    if values.size == 0:
        return np.zeros((0, objectives or 1))
    if values.ndim != 2 or np.isnan(values).any() or objectives not in (None, values.shape[1]):
        wanted = "(points, objectives)" if objectives is None else f"(points, {objectives})"
        raise ValueError(f"`points` must be a table of numbers of shape {wanted}, got the shape {values.shape}.")
    return values


__all__ = [
    "crowding_distance",
    "epsilon_constraint",
    "hypervolume",
    "nondominated_fronts",
    "pareto_front",
    "weighted_sum",
]
