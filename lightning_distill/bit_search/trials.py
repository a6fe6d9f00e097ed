"""Plans that were tried, and ways to propose better ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_distill.bit_search.allocate import Plan, Table, allocate_bits, check_tables, plan_sum
from lightning_distill.bit_search.pareto import pareto_front


@dataclass(frozen=True)
class Trial:
    """A plan that was tried.

    Attributes:
        plan: Bits by layer.
        loss: What the whole plan does to the outputs; smaller is better.
        cost: What it costs in storage or time.
    """

    plan: Plan
    loss: float
    cost: float


class Trials:
    """The losses of plans, each computed once.

    Args:
        loss: Loss of a plan, deterministic.
        costs: Cost of each layer with each number of bits; its numbers of bits are what a search may choose from.

    Raises:
        ValueError: If ``costs`` is empty or not finite.

    Example:
        >>> trials = Trials(lambda plan: 1 / sum(plan.values()), {"a": {2: 2.0, 4: 4.0}})
        >>> trials({"a": 4}).loss, len(trials)
        (0.25, 1)
    """

    def __init__(self, loss: Callable[[Plan], float], costs: Table) -> None:
        check_tables(costs, costs)
        self.costs = {layer: dict(sorted(row.items())) for layer, row in costs.items()}
        self._loss = loss
        self._done: dict[tuple[int, ...], Trial] = {}

    def __call__(self, plan: Mapping[str, int]) -> Trial:
        """Try ``plan``, unless it was.

        Raises:
            ValueError: If it names other layers or numbers of bits than ``costs``.
        """
        if plan.keys() != self.costs.keys() or any(plan[layer] not in row for layer, row in self.costs.items()):
            raise ValueError(f"The plan {dict(plan)} does not choose from {self.choices}.")
        key = tuple(plan[layer] for layer in self.costs)
        if key not in self._done:
            plan = {layer: plan[layer] for layer in self.costs}
            self._done[key] = Trial(plan, float(self._loss(plan)), plan_sum(plan, self.costs))
        return self._done[key]

    def __len__(self) -> int:
        return len(self._done)

    @property
    def done(self) -> list[Trial]:
        """All that were tried, in order."""
        return list(self._done.values())

    @property
    def choices(self) -> dict[str, list[int]]:
        """Numbers of bits by layer, rising."""
        return {layer: list(row) for layer, row in self.costs.items()}

    @property
    def highest(self) -> Plan:
        """Most bits everywhere."""
        return {layer: max(row) for layer, row in self.costs.items()}

    def front(self) -> list[Trial]:
        """Those that no other beats in both loss and cost, by rising cost; of equal ones the first."""
        tried = self.done
        best = [tried[index] for index in pareto_front([(trial.loss, trial.cost) for trial in tried])]
        by_values = {(trial.cost, trial.loss): trial for trial in reversed(best)}
        return [by_values[key] for key in sorted(by_values)]

    def best(self, budget: float) -> Trial:
        """The least loss within ``budget``; of equal ones the cheapest.

        Raises:
            ValueError: If nothing that was tried is within it.
        """
        within = [trial for trial in self.done if trial.cost <= budget * (1 + 1e-12)]
        if not within:
            raise ValueError(f"No plan that was tried costs at most {budget:g}.")
        return min(within, key=lambda trial: (trial.loss, trial.cost))


def layer_errors(trials: Trials) -> dict[str, dict[int, float]]:
    """What each layer alone does: the loss with this layer at fewer bits, minus that with most bits everywhere.

    One trial, and one more for each layer and number of bits below its largest. Differences below zero are noise, and
    count as zero.
    """
    highest = trials.highest
    base = trials(highest).loss
    return {
        layer: {
            bits: max(trials(highest | {layer: bits}).loss - base, 0.0) if bits != highest[layer] else 0.0
            for bits in row
        }
        for layer, row in trials.choices.items()
    }


def budgets_between(costs: Table, points: int) -> list[float]:
    """Budgets from the cheapest plan's cost to the most expensive one's, in equal ratios: fronts are steep at few bits.

    Evenly spaced where the cheapest plan costs nothing.

    Raises:
        ValueError: If ``points`` is below 2.

    Example:
        >>> [round(budget) for budget in budgets_between({"a": {2: 20.0, 8: 80.0}}, 3)]
        [20, 40, 80]
    """
    if not points >= 2:
        raise ValueError(f"`points` must be at least 2, got {points}.")
    low = math.fsum(min(row.values()) for row in costs.values())
    high = math.fsum(max(row.values()) for row in costs.values())
    shares = [point / (points - 1) for point in range(points)]
    between = [low * (high / low) ** share if low > 0 else low + (high - low) * share for share in shares]
    return [low, *between[1:-1], high]


def try_allocations(trials: Trials, errors: Table, budgets: Iterable[float]) -> list[Trial]:
    """Try the best plan by ``errors`` for each budget; see :func:`~lightning_distill.bit_search.allocate_bits`."""
    return [trials(allocate_bits(errors, trials.costs, budget)) for budget in budgets]


def greedy(trials: Trials, budget: float | None = None) -> list[Trial]:
    """From most bits everywhere, take bits from the layer that minds least, again and again.

    In every step each layer is tried with its next lower number of bits, and the one that loses least per cost saved is
    chosen: about ``L ** 2 / 2`` trials for each number of bits. The whole plan is looked at every time, so layers that
    are bad together are found out.

    Args:
        trials: Where plans are tried.
        budget: Stop at the first plan within it; by default go down to the fewest bits everywhere.

    Returns:
        The plans on the way, the last one within ``budget``.

    Raises:
        ValueError: If ``budget`` is below the cheapest plan's cost.
    """
    smallest = math.fsum(min(row.values()) for row in trials.costs.values())
    if budget is not None and not budget >= smallest:
        raise ValueError(f"`budget` is {budget:g}, but the cheapest plan costs {smallest:g}.")
    now = trials(trials.highest)
    way = [now]
    while budget is None or now.cost > budget * (1 + 1e-12):
        lower = [trials(plan) for plan in _neighbours(trials, now.plan, -1).values()]
        lower = [trial for trial in lower if trial.cost < now.cost]
        if not lower:
            break
        now = min(lower, key=lambda trial: ((trial.loss - now.loss) / (now.cost - trial.cost), trial.loss))
        way.append(now)
    return way


def refine(trials: Trials, plan: Mapping[str, int], budget: float) -> Trial:
    """Improve a plan within ``budget``, until its neighbourhood holds nothing better.

    In every round each layer is tried with its next higher and its next lower number of bits, all others as they are.
    These errors, which know about the other layers, go into the integer programme again; where its plan is no better,
    the most promising exchanges between a few layers are tried. About three trials per layer and round.

    Args:
        trials: Where plans are tried.
        plan: Where to begin: :func:`~lightning_distill.bit_search.allocate_bits` of :func:`layer_errors`.
        budget: Largest cost.

    Returns:
        The least loss within ``budget`` of all that were tried.

    Raises:
        ValueError: If ``plan`` costs more than the budget, or does not choose from what there is.
    """
    now = trials(plan)
    if now.cost > budget * (1 + 1e-12):
        raise ValueError(f"`plan` costs {now.cost:g}, more than the budget of {budget:g}.")
    while True:
        errors = _errors_around(trials, now)
        costs = {layer: {bits: trials.costs[layer][bits] for bits in row} for layer, row in errors.items()}
        solved = trials(allocate_bits(errors, costs, budget))
        if not solved.loss < now.loss:
            solved = _exchange(trials, now, errors, budget)
        if not solved.loss < now.loss:
            return trials.best(budget)
        now = solved


def evolve(
    trials: Trials, evaluations: int, *, start: Sequence[Plan] = (), population: int = 24, seed: int = 0
) -> None:
    """Look for the front of loss and cost with NSGA-II (Deb et al. 2002), by Optuna.

    From nothing it is hardly better than chance at a few hundred plans; give it those of
    :func:`try_allocations` to ``start`` from.

    Args:
        trials: Where plans are tried. Those that were tried before are not counted.
        evaluations: How many new plans are tried at most, positive; ``start`` included.
        start: Plans to begin with.
        population: Size of a generation, at least 2.
        seed: Of the proposals.

    Raises:
        ModuleNotFoundError: If Optuna is not installed.
        ValueError: If an argument is outside its range.
    """
    if not evaluations >= 1:
        raise ValueError(f"`evaluations` must be positive, got {evaluations}.")
    if not population >= 2:
        raise ValueError(f"`population` must be at least 2, got {population}.")
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("NSGA-II needs Optuna: pip install 'lightning-distill[search]'") from error

    def objective(trial: Any) -> tuple[float, float]:
        tried = trials({layer: trial.suggest_categorical(layer, bits) for layer, bits in trials.choices.items()})
        return tried.loss, tried.cost

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=seed)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for plan in start:
            study.enqueue_trial(dict(plan))
        before = len(trials)
        for _ in range(20 * evaluations):  # proposals repeat themselves; those cost nothing
            if len(trials) - before >= evaluations:
                break
            study.optimize(objective, n_trials=1)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _errors_around(trials: Trials, now: Trial) -> dict[str, dict[int, float]]:
    """Change of the loss when one layer takes a step up or down; 0 where it stays."""
    errors = {layer: {bits: 0.0} for layer, bits in now.plan.items()}
    for direction in (-1, 1):
        for layer, plan in _neighbours(trials, now.plan, direction).items():
            errors[layer][plan[layer]] = trials(plan).loss - now.loss
    return errors


def _exchange(trials: Trials, now: Trial, errors: Table, budget: float) -> Trial:
    """The best of the most promising plans in which one layer takes a step up, and one or two a step down."""
    plans: dict[tuple[int, ...], Plan] = {}
    for raised in _neighbours(trials, now.plan, 1).values():
        for once in [raised, *_neighbours(trials, raised, -1).values()]:
            for plan in [once, *_neighbours(trials, once, -1).values()]:
                near = all(plan[layer] in row for layer, row in errors.items())
                if near and plan != now.plan and plan_sum(plan, trials.costs) <= budget * (1 + 1e-12):
                    plans[tuple(plan.values())] = plan
    promising = sorted(plans.values(), key=lambda plan: plan_sum(plan, errors))[: len(errors)]
    return min((trials(plan) for plan in promising), key=lambda trial: trial.loss, default=now)


def _neighbours(trials: Trials, plan: Mapping[str, int], direction: int) -> dict[str, Plan]:
    """By layer, the plan in which it has its next higher (1) or next lower (-1) number of bits."""
    found = {}
    for layer, bits in trials.choices.items():
        place = bits.index(plan[layer]) + direction
        if 0 <= place < len(bits):
            found[layer] = dict(plan) | {layer: bits[place]}
    return found


__all__ = ["Trial", "Trials", "budgets_between", "evolve", "greedy", "layer_errors", "refine", "try_allocations"]
