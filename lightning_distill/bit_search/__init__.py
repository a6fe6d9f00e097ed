"""How many bits each layer gets: sensitivities, an integer programme for a budget, and fronts."""

from lightning_distill.bit_search.allocate import (
    Plan,
    Table,
    accuracy_size_reward,
    allocate_bits,
    plan_sum,
    weight_bits,
)
from lightning_distill.bit_search.channels import allocate_channels, channel_bits, channel_importance, channel_shares
from lightning_distill.bit_search.pareto import (
    crowding_distance,
    epsilon_constraint,
    hypervolume,
    nondominated_fronts,
    pareto_front,
    weighted_sum,
)
from lightning_distill.bit_search.quantized import QuantizedWeights
from lightning_distill.bit_search.result import BitSearchResult
from lightning_distill.bit_search.rounding import RoundedWeights, effective_bits, round_weight
from lightning_distill.bit_search.search import search_bits
from lightning_distill.bit_search.sensitivity import (
    PlanLoss,
    channel_fisher_errors,
    channel_squared_errors,
    divergence,
    fisher_errors,
    squared_errors,
)
from lightning_distill.bit_search.trials import (
    Trial,
    Trials,
    budgets_between,
    evolve,
    greedy,
    layer_errors,
    refine,
    try_allocations,
)

__all__ = [
    "BitSearchResult",
    "Plan",
    "PlanLoss",
    "QuantizedWeights",
    "RoundedWeights",
    "Table",
    "Trial",
    "Trials",
    "accuracy_size_reward",
    "allocate_bits",
    "allocate_channels",
    "budgets_between",
    "channel_bits",
    "channel_fisher_errors",
    "channel_importance",
    "channel_shares",
    "channel_squared_errors",
    "crowding_distance",
    "divergence",
    "effective_bits",
    "epsilon_constraint",
    "evolve",
    "fisher_errors",
    "greedy",
    "hypervolume",
    "layer_errors",
    "nondominated_fronts",
    "pareto_front",
    "plan_sum",
    "refine",
    "round_weight",
    "search_bits",
    "squared_errors",
    "try_allocations",
    "weight_bits",
    "weighted_sum",
]
