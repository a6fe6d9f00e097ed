"""Combinations of gradients that avoid conflicts: PCGrad and CAGrad, as weights of the terms."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_distill.weighting.min_norm import checked_gram


def pcgrad_weights(gram: Tensor) -> Tensor:
    r"""Weights of the sum of gradients, each freed of its conflicts with the others.

    Where :math:`\langle g_i, g_j \rangle < 0`, the part of :math:`g_i` along :math:`g_j` is taken out, for one
    :math:`j` after the other. The result is a combination of the original gradients, so that their inner products are
    all that is needed. Yu et al. (2020), algorithm 1, https://arxiv.org/abs/2001.06782; they draw the order of the
    :math:`j` anew in every step, which matters from three terms on. Here it is the order of the terms.

    Args:
        gram: Inner products ``g_i · g_j``, shape ``(T, T)``.

    Returns:
        Weights, shape ``(T,)``, float64 on the CPU; all 1 where there is no conflict, never below 1.

    Raises:
        ValueError: If ``gram`` is not square, or not finite.

    Example:
        >>> pcgrad_weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
        tensor([1.5000, 1.5000], dtype=torch.float64)
    """
    matrix = checked_gram(gram)
    rows = np.eye(len(matrix))  # row i: projected gradient i in terms of the original ones
    for i in range(len(matrix)):
        for j in range(len(matrix)):
            along = rows[i] @ matrix[:, j]
            if j != i and along < 0:
                rows[i, j] -= along / matrix[j, j]
    return torch.from_numpy(rows.sum(axis=0))


def cagrad_weights(gram: Tensor, *, c: float = 0.4) -> Tensor:
    r"""Weights of the direction near the mean gradient that helps the worst-off term most.

    .. math:: d = g_0 + \frac{c \|g_0\|}{\|g_w\|} g_w, \quad g_w = \sum_i w_i g_i, \quad
              w = \arg\min_{w \in \Delta} \langle g_w, g_0 \rangle + c \|g_0\| \|g_w\|

    with the mean gradient :math:`g_0`. Liu et al. (2021), algorithm 1, https://arxiv.org/abs/2110.14048. ``c = 0`` is
    the mean; above 1 it approaches MGDA. The convex problem over the simplex is solved by projected gradient descent.

    Args:
        gram: Inner products ``g_i · g_j``, shape ``(T, T)``.
        c: Radius around the mean gradient, relative to its norm; not negative.

    Returns:
        Weights, shape ``(T,)``, float64 on the CPU.

    Raises:
        ValueError: If ``c`` is negative, or ``gram`` not square or not finite.
    """
    if not 0 <= c < math.inf:
        raise ValueError(f"`c` must not be negative, got {c}.")
    matrix = checked_gram(gram)
    n = len(matrix)
    mean = np.full(n, 1 / n)
    length = math.sqrt(max(float(mean @ matrix @ mean), 0.0))
    largest = float(matrix.diagonal().max())
    if c == 0 or length <= 1e-12 * math.sqrt(max(largest, 0.0)):
        return torch.from_numpy(mean)
    w = _worst_case(matrix / largest, mean, c * length / math.sqrt(largest))
    reach = math.sqrt(max(float(w @ matrix @ w), 0.0))
    if reach <= 1e-12 * math.sqrt(largest):
        return torch.from_numpy(mean)
    return torch.from_numpy(mean + c * length / reach * w)


def _worst_case(gram: NDArray[np.float64], mean: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """The simplex's point that minimises ``<g_w, g_0> + radius |g_w|``, by accelerated projected gradients."""

    def value(w: NDArray[np.float64]) -> float:
        return float(w @ gram @ mean + radius * math.sqrt(max(float(w @ gram @ w), 0.0)))

    best = w = mean
    rate = 1.0
    for _ in range(200):
        along = gram @ w
        slope = gram @ mean + radius * along / math.sqrt(max(float(w @ along), 1e-24))
        moved = onto_simplex(w - rate * slope)
        if value(moved) < value(best) - 1e-15:
            best = w = moved
            rate *= 1.5
        elif rate < 1e-9:
            break
        else:
            rate /= 3
    return best


def onto_simplex(point: NDArray[np.float64]) -> NDArray[np.float64]:
    """The nearest point with coordinates that are not negative and sum to 1 (Held, Wolfe and Crowder 1974)."""
    falling = np.sort(point)[::-1]
    excess = (np.cumsum(falling) - 1) / np.arange(1, len(point) + 1)
    shift = excess[np.nonzero(falling > excess)[0][-1]]
    nearest: NDArray[np.float64] = np.maximum(point - shift, 0)
    return nearest
