"""Weights of the terms by an evolution strategy."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_distill.weighting.search.result import Objective, WeightSearch, require_weights


def recombination_weights(mu: int) -> tuple[Tensor, float]:
    r"""Weights :math:`\propto \log(\mu + \frac12) - \log i` of the ``mu`` best, and their effective number.

    Those of CMA-ES (Hansen 2016, https://arxiv.org/abs/1604.00772) for twice as many candidates as parents.

    Args:
        mu: Number of parents, positive.

    Returns:
        The weights, shape ``(mu,)``, falling, with sum one; and :math:`1 / \sum w^2`.

    Raises:
        ValueError: If ``mu`` is not positive.
    """
    if not mu >= 1:
        raise ValueError(f"`mu` must be positive, got {mu}.")
    ranks = torch.arange(1, mu + 1, dtype=torch.float64)
    weights = math.log(mu + 0.5) - ranks.log()
    weights = weights / weights.sum()
    return weights, 1 / weights.square().sum().item()


def evolution_search(
    objective: Objective,
    initial: Mapping[str, float],
    *,
    population: int = 8,
    mu: int = 4,
    sigma: float = 0.3,
    generations: int = 10,
    seed: int = 0,
) -> WeightSearch:
    r"""A :math:`(\mu/\mu_w, \lambda)` evolution strategy in the logarithms of the weights.

    Each generation draws ``population`` weights around the mean with the spread ``sigma``, and the next mean is the
    weighted mean of the ``mu`` best. The spread follows the length of the path that the mean takes (cumulative
    step-size adaptation, Hansen 2016, https://arxiv.org/abs/1604.00772, section 4): longer than that of a random walk,
    it grows. It learns no correlations between weights; for those, and for other settings beside weights,
    ``lightning-distill search`` has CMA-ES.

    Args:
        objective: Validation loss of a training with the given weights; only its order matters.
        initial: Weights to start from, positive, by term name.
        population: Trainings per generation, at least ``mu``.
        mu: How many of them the next generation comes from, positive.
        sigma: Initial spread in the logarithms (0.3: by about 35 %), positive.
        generations: Their number, positive.
        seed: Of the draws.

    Raises:
        ValueError: If an argument is outside its range.
    """
    require_weights(initial)
    shares, effective = recombination_weights(mu)
    if not population >= mu:
        raise ValueError(f"`population` must be at least `mu`, got {population} and {mu}.")
    if not 0 < sigma < math.inf:
        raise ValueError(f"`sigma` must be positive, got {sigma}.")
    if not generations >= 1:
        raise ValueError(f"`generations` must be positive, got {generations}.")
    generator = torch.Generator().manual_seed(seed)
    names, n = list(initial), len(initial)
    mean = torch.tensor([math.log(initial[name]) for name in names], dtype=torch.float64)
    path = torch.zeros_like(mean)
    rate = (effective + 2) / (n + effective + 5)
    brake = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (n + 1)) - 1) + rate
    usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))  # length of a standard normal vector
    result = WeightSearch()
    for _ in range(generations):
        draws = torch.randn(population, n, dtype=torch.float64, generator=generator)
        losses = [
            result.note(weights, objective(weights))
            for z in draws
            for weights in [dict(zip(names, (mean + sigma * z).exp().tolist(), strict=True))]
        ]
        order = sorted(range(population), key=losses.__getitem__)[:mu]
        step = shares @ draws[order]
        mean = mean + sigma * step
        path = (1 - rate) * path + math.sqrt(rate * (2 - rate) * effective) * step
        sigma *= math.exp(rate / brake * (path.norm().item() / usual - 1))
    return result
