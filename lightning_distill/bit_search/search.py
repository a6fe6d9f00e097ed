"""A whole search: sensitivities, an integer programme for the budget, refinement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from lightning_distill.bit_search.allocate import Plan, Table, allocate_bits
from lightning_distill.bit_search.budgets import FLOAT, Budget
from lightning_distill.bit_search.channels import allocate_channels, channel_shares
from lightning_distill.bit_search.quantized import QuantizedWeights
from lightning_distill.bit_search.result import BitSearchResult
from lightning_distill.bit_search.rounding import RoundedWeights, check_bits
from lightning_distill.bit_search.sensitivity import (
    PlanLoss,
    channel_fisher_errors,
    channel_squared_errors,
    fisher_errors,
    squared_errors,
)
from lightning_distill.bit_search.trials import (
    Trials,
    budgets_between,
    evolve,
    greedy,
    layer_errors,
    refine,
    try_allocations,
)
from lightning_distill.hardware import CostModel
from lightning_distill.quantization import quantized_layers
from lightning_distill.quantization.spec import Bits
from lightning_distill.tasks import Classification, Task

Sensitivity = Literal["kl", "fisher", "weights"]
Refinement = Literal["none", "neighbours", "greedy", "nsga2"]
Granularity = Literal["layer", "channel"]


def search_bits(
    network: nn.Module,
    batches: Iterable[Any],
    *,
    effective_bits: float | None = None,
    max_bytes: float | None = None,
    max_latency: float | None = None,
    max_energy: float | None = None,
    cost_model: CostModel | str | Path | None = None,
    bits: Sequence[int] = (2, 4, 8),
    layers: Sequence[str] | None = None,
    sensitivity: Sensitivity = "kl",
    refinement: Refinement = "neighbours",
    granularity: Granularity = "layer",
    points: int = 14,
    evaluations: int = 100,
    seed: int = 0,
    task: Task | None = None,
) -> BitSearchResult:
    """Choose the bits of each layer's weights within a budget such that the outputs change least.

    The layers' own effects are measured (or estimated), the integer programme is solved for the budget and for
    ``points`` others, and whole plans are compared by the divergence of the network's outputs from its own in full
    precision. Nothing about the network is changed, and no label is looked at. Apply the plan with
    ``prepare(network, overrides=result.plan)`` or, to a network that is quantized already, ``set_bits``.

    Args:
        network: In full precision: its weights are rounded with one step per output channel. Or quantized by
            :func:`~lightning_distill.quantization.prepare` (and calibrated): then as its layers do it.
        batches: What outputs are compared on; a few hundred samples of training data, say.
        effective_bits: Largest mean number of bits per weight of the searched layers.
        max_bytes: Largest storage of their weights, steps not counted.
        max_latency: Most seconds of the whole network for the first of ``batches``, by ``cost_model``.
        max_energy: Most joules of the whole network for the first of ``batches``, by ``cost_model``. Exactly one of the
            four budgets.
        cost_model: A :class:`~lightning_distill.hardware.CostModel`, a preset or the file of one. Fewer bits are fewer
            bytes to one of eager mode, and faster arithmetic only as far as its ``speedups`` say; one of ONNX Runtime
            has measured kernels.
        bits: Numbers of bits to choose from: 2 to 16, or those of the quantized layers, 1 to 8, 16 and 32.
        layers: Names of the searched layers; by default all linear, convolution and embedding layers, or all that are
            quantized.
        sensitivity: ``"kl"``: the divergence with one layer rounded (one pass over ``batches`` per layer and number of
            bits). ``"fisher"``: see :func:`~lightning_distill.bit_search.fisher_errors`. ``"weights"``: the squared
            rounding error.
        refinement: ``"neighbours"``: see :func:`~lightning_distill.bit_search.refine`; ``"greedy"``: bits are taken
            away one layer at a time, which tries about ``L ** 2 / 2`` plans per number of bits and gives the best
            fronts; ``"nsga2"``: an evolution from the plans found so far, for fronts (needs Optuna); ``"none"``.
        granularity: ``"channel"`` divides what was found for the layers among their output channels, as a second-order
            estimate has it (:func:`~lightning_distill.bit_search.channel_fisher_errors`), and keeps that where the
            outputs change less. For budgets in bits or bytes, and 1 to 8 bits.
        points: Budgets for the front, at least 2; 0 for none.
        evaluations: Plans that ``"nsga2"`` tries.
        seed: Of ``"fisher"`` and ``"nsga2"``.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Raises:
        ValueError: If no plan is within the budget or full precision is, not exactly one budget is given, there is no
            such layer, or another argument is outside its range.
    """
    budget = Budget(effective_bits, max_bytes, max_latency, max_energy, cost_model)
    check_search(budget, bits, sensitivity, refinement, points, granularity)
    task = Classification() if task is None else task
    batches = list(batches)
    kind = QuantizedWeights if quantized_layers(network) else RoundedWeights
    rounded = kind(network, bits, layers)
    if granularity == "channel":
        _require_steps_of_channels(network, rounded.sizes)
    loss = PlanLoss(network, rounded, batches, task)
    costs = budget.costs(network, batches[0], rounded.sizes, rounded.bits, task.run)
    limit = budget.limit(costs)
    trials = Trials(loss, costs.table)
    errors: Table
    if sensitivity == "kl":
        errors = layer_errors(trials)
    elif sensitivity == "fisher":
        errors = fisher_errors(network, rounded, batches, task, seed=seed)
    else:
        errors = squared_errors(rounded)
    for choice in bits:
        trials(dict.fromkeys(rounded.sizes, choice))  # what the plan has to beat
    if points:
        try_allocations(trials, errors, budgets_between(trials.costs, points))
    trials(allocate_bits(errors, trials.costs, limit))
    _REFINEMENTS[refinement](trials, limit, evaluations, seed)
    best = trials.best(limit)
    plan: dict[str, Bits] = {**best.plan}
    least = best.loss
    if granularity == "channel":
        estimates = _channel_errors(network, rounded, batches, task, seed)
        for candidate in _channel_plans(estimates, errors, rounded, best.plan, limit):
            if (found := loss(candidate)) < least:
                plan, least = {**candidate}, found
    weights = sum(rounded.sizes.values())
    return BitSearchResult(
        plan=plan,
        loss=least,
        budget=limit / weights if budget.unit == "bits" else budget.value,
        sizes=rounded.sizes,
        errors={layer: dict(row) for layer, row in errors.items()},
        trials=trials.done,
        unit=budget.unit,
        rest=costs.rest,
    )


def _require_steps_of_channels(network: nn.Module, names: Iterable[str]) -> None:
    layers = quantized_layers(network)
    if shared := [name for name in names if name in layers and layers[name].spec.granularity == "tensor"]:
        raise ValueError(
            f"The channels of the layers {shared} share one step and cannot have bits of their own: prepare them with "
            "granularity='channel', or search with granularity='layer'."
        )


def _channel_errors(
    network: nn.Module, rounded: RoundedWeights | QuantizedWeights, batches: Sequence[Any], task: Task, seed: int
) -> dict[str, Tensor]:
    """What each channel alone does to the outputs, by a second-order estimate; else its squared error.

    Rows of tables always have their squared error: samples do not have every token, and would find the others useless.
    """
    squares = channel_squared_errors(rounded)
    if not task.imitable:
        return squares
    tables = [name for name in squares if isinstance(network.get_submodule(name), nn.Embedding)]
    found = channel_fisher_errors(network, rounded, batches, task, seed=seed)
    return found | {name: squares[name] for name in tables}


def _channel_plans(
    estimates: dict[str, Tensor],
    layers: Table,
    rounded: RoundedWeights | QuantizedWeights,
    plan: Plan,
    limit: float,
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Channels of all layers within one budget, by the estimates and by what was measured for layers, divided as the
    estimates have it; and those of each layer within what it has in ``plan``."""
    shares = channel_shares(estimates, layers, rounded.bits)
    yield allocate_channels(shares, rounded.sizes, rounded.bits, limit)
    yield allocate_channels(estimates, rounded.sizes, rounded.bits, limit)
    within: dict[str, tuple[int, ...]] = {}
    for layer, own in shares.items():
        size = {layer: rounded.sizes[layer]}
        within |= allocate_channels({layer: own}, size, rounded.bits, float(size[layer] * plan[layer]))
    yield within


def _neighbours(trials: Trials, budget: float, evaluations: int, seed: int) -> None:
    refine(trials, trials.best(budget).plan, budget)


def _greedy(trials: Trials, budget: float, evaluations: int, seed: int) -> None:
    greedy(trials)


def _nsga2(trials: Trials, budget: float, evaluations: int, seed: int) -> None:
    evolve(trials, evaluations, start=[trial.plan for trial in trials.front()], seed=seed)


_REFINEMENTS: dict[str, Callable[[Trials, float, int, int], Any]] = {
    "none": lambda trials, budget, evaluations, seed: None,
    "neighbours": _neighbours,
    "greedy": _greedy,
    "nsga2": _nsga2,
}


def check_search(
    budget: Budget, bits: Sequence[int], sensitivity: str, refinement: str, points: int, granularity: str
) -> None:
    """Refuse settings that no network could be searched with; see :func:`search_bits`."""
    check_bits(bits)
    if budget.name == "effective_bits" and not min(bits) <= budget.value <= FLOAT:
        limit = f"below the fewest bits, {min(bits)}" if not budget.value > FLOAT else "above float32"
        raise ValueError(
            f"`effective_bits` is {budget.value:g}, which is {limit}. Choose a budget from {min(bits)} to {FLOAT}."
        )
    if sensitivity not in ("kl", "fisher", "weights"):
        raise ValueError(f"`sensitivity` must be 'kl', 'fisher' or 'weights', got {sensitivity!r}.")
    if refinement not in _REFINEMENTS:
        raise ValueError(f"`refinement` must be one of {list(_REFINEMENTS)}, got {refinement!r}.")
    if granularity not in ("layer", "channel"):
        raise ValueError(f"`granularity` must be 'layer' or 'channel', got {granularity!r}.")
    if granularity == "channel" and (budget.unit != "bits" or max(bits) > 8):
        raise ValueError(
            "With granularity='channel' the budget is `effective_bits` or `max_bytes`, and `bits` are 1 to 8, got "
            f"`{budget.name}` and {list(bits)}: kernels compute a layer with the bits of its widest channel."
        )
    if points != 0 and not points >= 2:
        raise ValueError(f"`points` must be 0 or at least 2, got {points}.")


__all__ = ["Granularity", "Refinement", "Sensitivity", "check_search", "search_bits"]
