"""The shortest vector in the convex hull of the terms' gradients: MGDA (Désidéri 2012)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = 1e-10


def mgda_weights(gram: Tensor) -> Tensor:
    r"""Weights of the shortest convex combination of gradients, from their inner products.

    .. math:: \min_\alpha \Big\| \sum_i \alpha_i g_i \Big\|^2, \quad \alpha_i \ge 0, \; \sum_i \alpha_i = 1

    The direction :math:`d = -\sum_i \alpha_i g_i` lowers all losses at the same time,
    :math:`\langle g_i, d \rangle \le -\|d\|^2`, or is zero where none can be lowered without raising another (Pareto
    stationary). Désidéri (2012); Sener and Koltun (2018), section 3, https://arxiv.org/abs/1810.04650.

    Two terms have a closed form; more are solved by Wolfe's active-set method (1976), which ends after finitely many
    steps and gives weights that are exactly 0 where they are 0.

    Args:
        gram: Inner products ``g_i · g_j``, shape ``(T, T)``.

    Returns:
        Weights, shape ``(T,)``, float64 on the CPU.

    Raises:
        ValueError: If ``gram`` is not square, or not finite.

    Example:
        >>> mgda_weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    matrix = checked_gram(gram)
    largest = float(matrix.diagonal().max())
    if largest <= 0:  # no gradient at all
        return torch.full((len(matrix),), 1 / len(matrix), dtype=torch.float64)
    weights = _two(matrix) if len(matrix) == 2 else _wolfe(matrix / largest)
    return torch.from_numpy(weights)


def checked_gram(gram: Tensor) -> NDArray[np.float64]:
    """``gram`` as an array.

    Raises:
        ValueError: If it is not square, or not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ValueError(f"`gram` must be a square matrix of inner products, got the shape {tuple(gram.shape)}.")
    matrix: NDArray[np.float64] = gram.detach().cpu().double().numpy()
    if not np.isfinite(matrix).all():
        raise ValueError(f"`gram` must be finite, got {matrix.tolist()}.")
    return matrix


def _two(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    (a, b), (_, c) = gram
    apart = a - 2 * b + c  # |g1 - g2|^2
    first = 0.5 if apart <= TOLERANCE * max(a, c) else min(max((c - b) / apart, 0.0), 1.0)
    return np.array([first, 1 - first])


def _wolfe(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Wolfe's method: grow the set of gradients that take part by the one that disagrees most, shrink it as needed."""
    weights = np.zeros(len(gram))
    active = [int(gram.diagonal().argmin())]
    weights[active] = 1.0
    for _ in range(20 * len(gram)):
        along = gram @ weights  # inner product of each gradient with the combination
        worst = int(along.argmin())
        if along[worst] >= weights @ along - TOLERANCE or worst in active:
            break
        active.append(worst)
        while True:
            best = _affine_minimum(gram[np.ix_(active, active)])
            if (best > TOLERANCE).all():
                weights[:] = 0
                weights[active] = best
                break
            now: NDArray[np.float64] = weights[active]
            leaving = best <= TOLERANCE
            reach = min(now[leaving] / np.maximum(now[leaving] - best[leaving], np.finfo(float).tiny))
            now = (now + min(float(reach), 1.0) * (best - now)).astype(np.float64)
            now[now <= TOLERANCE] = 0
            weights[:] = 0
            weights[active] = now / now.sum()
            active = [place for place in active if weights[place] > 0]
    normalised: NDArray[np.float64] = weights / weights.sum()
    return normalised


def _affine_minimum(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients, of sum 1 and any sign, of the shortest affine combination."""
    n = len(gram)
    system = np.ones((n + 1, n + 1))
    system[:n, :n] = gram
    system[n, n] = 0
    right = np.zeros(n + 1)
    right[n] = 1
    solution = np.linalg.lstsq(system, right, rcond=None)[0][:n]
    return solution.astype(np.float64)
