"""A bound on the error of a compressed network, and what it takes for granted."""

from __future__ import annotations

import math


def performance_bound(dimension: float, samples: float, bits: float, *, c1: float = 1.0, c2: float = 1.0) -> float:
    r"""The bound :math:`c_1 \sqrt{d / n} + c_2 2^{-b}` on the accuracy that a compressed network loses.

    The first part is that of uniform convergence for a class of complexity ``d`` (such as Bartlett and Mendelson 2002),
    the second the error of rounding. Without its constants it bounds nothing: measure them,
    :func:`~lightning_distill.diagnostics.recovery_bound_fit` fits them to gaps. How many times smaller the network has
    become is in it only as far as that changes ``d``.

    Args:
        dimension: Complexity ``d`` of the class of networks, at least 0; not the number of weights.
        samples: Number of training samples ``n``, positive.
        bits: Bits of a weight ``b``, at least 0.
        c1: Of the first part, at least 0.
        c2: Of the second part, at least 0.

    Returns:
        A share of the samples. 1 and more says nothing.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> performance_bound(100, 10_000, 8)
        0.10390625
    """
    _check(samples, dimension=dimension, bits=bits, c1=c1, c2=c2)
    return c1 * math.sqrt(dimension / samples) + c2 * math.pow(2, -bits)


def implied_dimension(bound: float, samples: float, bits: float, *, c1: float = 1.0, c2: float = 1.0) -> float:
    """The ``d`` at which :func:`performance_bound` is ``bound``.

    Args:
        bound: At least what rounding alone gives, ``c2 * 2 ** -bits``.
        samples: See :func:`performance_bound`, as for the next three.
        bits: See there.
        c1: See there; positive.
        c2: See there.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> round(implied_dimension(0.02, 10_000, 8), 2)
        2.59
    """
    _check(samples, bits=bits, c1=c1, c2=c2)
    rounding = c2 * math.pow(2, -bits)
    if not c1 > 0:
        raise ValueError(f"`c1` must be positive, got {c1}.")
    if not rounding <= bound < math.inf:
        raise ValueError(f"`bound` must be finite and at least {rounding:g}, which is rounding alone, got {bound}.")
    return samples * math.pow((bound - rounding) / c1, 2)


def _check(samples: float, **others: float) -> None:
    if not 0 < samples < math.inf:
        raise ValueError(f"`samples` must be positive and finite, got {samples}.")
    for name, value in others.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be at least 0 and finite, got {value}.")
