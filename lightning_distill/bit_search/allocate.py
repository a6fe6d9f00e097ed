"""The best number of bits for each layer within a budget: an integer programme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import LinearConstraint, milp

Table = Mapping[str, Mapping[int, float]]
"""A number for each layer and number of bits: ``{"layer": {2: 0.9, 4: 0.05}}``."""

Plan = dict[str, int]
"""Bits by layer."""


def allocate_bits(errors: Table, costs: Table, budget: float) -> Plan:
    r"""Choose the bits of each layer such that the errors' sum is least and the costs' sum is within ``budget``.

    .. math:: \min_b \sum_l E_l(b_l) \quad \text{with} \quad \sum_l C_l(b_l) \le C

    That is a multiple-choice knapsack, solved exactly by branch and bound (:func:`scipy.optimize.milp`). Where several
    plans have the least error, one that costs less is preferred.

    The errors are taken as additive. Divergences of single layers are nearly so, except where many layers have few
    bits; :func:`~lightning_distill.bit_search.refine` looks at whole plans.

    Args:
        errors: What each layer costs in quality with so many bits.
        costs: What it costs in bits, bytes or seconds; the same layers and numbers of bits.
        budget: Largest sum of costs.

    Returns:
        Bits by layer, in the order of ``errors``.

    Raises:
        ValueError: If the tables do not match, a number is not finite, or the cheapest plan is over the budget.

    Example:
        >>> errors = {"a": {2: 0.9, 8: 0.0}, "b": {2: 0.1, 8: 0.0}}
        >>> allocate_bits(errors, weight_bits({"a": 10, "b": 10}, (2, 8)), budget=100)
        {'a': 8, 'b': 2}
    """
    check_tables(errors, costs)
    smallest = sum(min(row.values()) for row in costs.values())
    if not budget >= smallest:
        raise ValueError(
            f"`budget` is {budget:g}, but the cheapest plan costs {smallest:g}. Raise it, or allow fewer bits."
        )
    choices = [(layer, bits) for layer, row in errors.items() for bits in row]
    error = np.array([errors[layer][bits] for layer, bits in choices])
    cost = np.array([costs[layer][bits] for layer, bits in choices])
    # The solver stops at an absolute gap of 1e-6, so the errors are scaled up; the second part breaks ties.
    scale = float(np.ptp(error)) or 1.0
    objective = 1e6 * (error - error.min()) / scale + 1e-4 * cost / max(float(np.abs(cost).max()), 1e-300)
    one_each = np.array([[float(layer == name) for layer, _ in choices] for name in errors])
    unit = max(abs(budget), float(np.abs(cost).max()), 1e-300)
    limits = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(cost[None] / unit, -np.inf, budget / unit * (1 + 1e-12)),
    ]
    found = milp(
        objective, integrality=np.ones(len(choices)), bounds=(0, 1), constraints=limits, options={"mip_rel_gap": 0}
    )
    if found.x is None:
        raise RuntimeError(f"The integer programme was not solved: {found.message}")
    return {layer: bits for (layer, bits), chosen in zip(choices, found.x, strict=True) if chosen > 0.5}


def weight_bits(sizes: Mapping[str, int], bits: Sequence[int]) -> dict[str, dict[int, float]]:
    """Cost of each choice in bits of storage: elements of the layer's weight times bits.

    Args:
        sizes: Elements of each layer's weight.
        bits: The choices.
    """
    return {layer: {choice: float(size * choice) for choice in bits} for layer, size in sizes.items()}


def plan_sum(plan: Mapping[str, int], table: Table) -> float:
    """Sum of a table's entries for the bits of ``plan``."""
    return math.fsum(table[layer][bits] for layer, bits in plan.items())


def accuracy_size_reward(accuracy: float, size: float, *, target: float, exponent: float = -0.07) -> float:
    r"""Reward of a searched model: :math:`A \cdot (S / S_0)^w` (MnasNet, Tan et al. 2019, equation 2).

    A quotient of accuracy and size would always prefer the smallest model, unless accuracy more than halves with the
    size. Here half the size is worth 5 % of the accuracy, by default.

    Args:
        accuracy: In [0, 1].
        size: Positive, in any unit.
        target: The size that is asked for, in the same unit, positive.
        exponent: ``w``, negative or zero.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> round(accuracy_size_reward(0.74, 4.0, target=4.0), 3)
        0.74
    """
    if not 0 <= accuracy <= 1:
        raise ValueError(f"`accuracy` must be in [0, 1], got {accuracy}.")
    for name, value in {"size": size, "target": target}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if not exponent <= 0:
        raise ValueError(f"`exponent` must not be positive (a larger size would be rewarded), got {exponent}.")
    return float(accuracy * (size / target) ** exponent)


def check_tables(errors: Table, costs: Table) -> None:
    """Refuse tables that do not have the same layers and choices.

    Raises:
        ValueError: If they do not, are empty, or a number is not finite.
    """
    if not errors or any(not row for row in errors.values()):
        raise ValueError("`errors` must have at least one layer, and one number of bits for each.")
    if {layer: set(row) for layer, row in errors.items()} != {layer: set(row) for layer, row in costs.items()}:
        raise ValueError(
            "`errors` and `costs` must have the same layers and numbers of bits, got "
            f"{ {layer: sorted(row) for layer, row in errors.items()} } and "
            f"{ {layer: sorted(row) for layer, row in costs.items()} }."
        )
    for name, table in {"errors": errors, "costs": costs}.items():
        for layer, row in table.items():
            for bits, value in row.items():
                if not math.isfinite(value):
                    raise ValueError(f"`{name}` of {layer!r} at {bits} bits must be finite, got {value}.")


__all__ = ["Plan", "Table", "accuracy_size_reward", "allocate_bits", "plan_sum", "weight_bits"]
