"""Search for the weights of the loss terms, with trainings as trials."""

from lightning_distill.weighting.search.bilevel import bilevel_search
from lightning_distill.weighting.search.evolution import evolution_search, recombination_weights
from lightning_distill.weighting.search.implicit import (
    conjugate_gradients,
    implicit_hypergradient,
    neumann_series,
)
from lightning_distill.weighting.search.reinforce import (
    expected_reward_gradient,
    reinforce_gradient,
    reinforce_search,
)
from lightning_distill.weighting.search.result import Objective, WeightSearch

__all__ = [
    "Objective",
    "WeightSearch",
    "bilevel_search",
    "conjugate_gradients",
    "evolution_search",
    "expected_reward_gradient",
    "implicit_hypergradient",
    "neumann_series",
    "recombination_weights",
    "reinforce_gradient",
    "reinforce_search",
]
