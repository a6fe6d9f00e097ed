"""Searches over plans, against all plans of a small problem whose layers interact."""

import itertools
import math

import pytest

from lightning_distill.bit_search import (
    Trials,
    allocate_bits,
    budgets_between,
    evolve,
    greedy,
    hypervolume,
    layer_errors,
    pareto_front,
    plan_sum,
    refine,
    try_allocations,
    weight_bits,
)

BITS = (2, 4, 8)
SIZES = {"a": 100, "b": 900, "c": 400, "d": 250, "e": 600}
COSTS = weight_bits(SIZES, BITS)
WEIGHT = {"a": 3.0, "b": 0.4, "c": 1.0, "d": 0.2, "e": 0.7}


def loss(plan):
    """Nearly additive; layers of few bits beside each other are worse than their sum."""
    single = {layer: WEIGHT[layer] * 4.0**-bits for layer, bits in plan.items()}
    return sum(single.values()) + 0.7 * sum(math.sqrt(single[x] * single[y]) for x, y in ("ab", "cd", "de"))


def everything():
    return [dict(zip(SIZES, bits, strict=True)) for bits in itertools.product(BITS, repeat=len(SIZES))]


def quality(trials):
    """Share of the true front's hypervolume."""
    worst = [1.01 * loss(dict.fromkeys(SIZES, 2)), 8.1 * sum(SIZES.values())]
    true = hypervolume([(loss(plan), plan_sum(plan, COSTS)) for plan in everything()], worst)
    return hypervolume([(trial.loss, trial.cost) for trial in trials.done], worst) / true


def test_plans_are_tried_once_in_the_order_of_the_layers():
    seen = []
    trials = Trials(lambda plan: seen.append(plan) or 0.5, COSTS)
    first = trials(dict.fromkeys(SIZES, 4))
    again = trials(dict.fromkeys(reversed(SIZES), 4))
    assert first is again
    assert seen == [dict.fromkeys(SIZES, 4)]
    assert first.cost == 4 * sum(SIZES.values())
    assert trials.highest == dict.fromkeys(SIZES, 8)
    with pytest.raises(ValueError, match="does not choose from"):
        trials(dict.fromkeys(SIZES, 3))
    with pytest.raises(ValueError, match="does not choose from"):
        trials({"a": 4})


def test_layer_errors_are_differences_to_most_bits_everywhere():
    trials = Trials(loss, COSTS)
    errors = layer_errors(trials)
    assert len(trials) == 1 + 2 * len(SIZES)
    base = loss(trials.highest)
    for layer in SIZES:
        assert errors[layer][8] == 0
        assert errors[layer][2] == pytest.approx(loss(trials.highest | {layer: 2}) - base)
    noisy = Trials(lambda plan: -1.0 if plan["a"] == 2 else 0.0, COSTS)
    assert layer_errors(noisy)["a"][2] == 0


def test_errors_and_allocations_at_several_budgets_find_most_of_the_front():
    trials = Trials(loss, COSTS)
    tried = try_allocations(trials, layer_errors(trials), budgets_between(COSTS, 14))
    assert len(trials) <= 5 * len(SIZES)
    assert [trial.cost for trial in tried] == sorted(trial.cost for trial in tried)
    assert quality(trials) >= 0.96
    front = trials.front()
    values = [(trial.loss, trial.cost) for trial in front]
    assert pareto_front(values) == list(range(len(front)))
    assert [trial.cost for trial in front] == sorted(trial.cost for trial in front)


def test_greedy_goes_from_most_bits_to_fewest_and_finds_the_front():
    trials = Trials(loss, COSTS)
    way = greedy(trials)
    assert way[0].plan == dict.fromkeys(SIZES, 8)
    assert way[-1].plan == dict.fromkeys(SIZES, 2)
    for before, after in itertools.pairwise(way):
        assert sum(before.plan[layer] != after.plan[layer] for layer in SIZES) == 1
        assert after.cost < before.cost
    assert quality(trials) >= 0.99
    budget = 4 * sum(SIZES.values())
    assert greedy(trials, budget)[-1].cost <= budget < greedy(trials, budget)[-2].cost


@pytest.mark.parametrize("average", [2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0])
def test_refinement_repairs_what_the_sum_of_errors_gets_wrong(average):
    budget = average * sum(SIZES.values())
    trials = Trials(loss, COSTS)
    start = trials(allocate_bits(layer_errors(trials), COSTS, budget))
    found = refine(trials, start.plan, budget)
    best = min(loss(plan) for plan in everything() if plan_sum(plan, COSTS) <= budget)
    assert found.cost <= budget
    assert found.loss == pytest.approx(best, rel=0.01)
    assert len(trials) < 50  # of 243


def test_greedy_takes_from_whom_minds_least_for_what_it_saves():
    errors = {"small": {2: 0.1, 4: 0.0}, "large": {2: 0.4, 4: 0.0}}
    costs = weight_bits({"small": 10, "large": 100}, (2, 4))
    way = greedy(Trials(lambda plan: plan_sum(plan, errors), costs))
    assert [trial.plan["large"] for trial in way] == [4, 2, 2]  # 0.4 for 200 bits, not 0.1 for 20
    errors["large"][2] = 2.0
    way = greedy(Trials(lambda plan: plan_sum(plan, errors), costs), budget=420)
    assert way[-1].plan == {"small": 2, "large": 4}


def test_budgets_go_up_in_equal_ratios():
    found = budgets_between(COSTS, 5)
    assert [found[0], found[-1]] == [2 * sum(SIZES.values()), 8 * sum(SIZES.values())]
    ratios = [after / before for before, after in itertools.pairwise(found)]
    assert ratios == pytest.approx([math.sqrt(2)] * 4)
    assert budgets_between({"a": {2: 0.0, 4: 8.0}}, 3) == [0.0, 4.0, 8.0]


def test_exchanges_find_what_the_integer_programme_misses():
    sizes = {"x": 10, "y": 10, "z": 10}
    costs = weight_bits(sizes, (2, 4))

    def joint(plan):  # raising one layer alone does nothing, which no sum of single steps knows
        return {(4, 2, 2): 1.0, (2, 4, 2): 0.9, (2, 2, 4): 0.8}.get(tuple(plan.values()), 1.2)

    trials = Trials(joint, costs)
    assert refine(trials, {"x": 4, "y": 2, "z": 2}, 80).plan == {"x": 2, "y": 2, "z": 4}


def test_refinement_needs_no_good_beginning():
    budget = 4 * sum(SIZES.values())
    trials = Trials(loss, COSTS)
    start = {"a": 2, "b": 2, "c": 2, "d": 8, "e": 4}
    found = refine(trials, start, budget)
    assert found.loss < 0.2 * loss(start)
    assert found.loss == pytest.approx(min(loss(p) for p in everything() if plan_sum(p, COSTS) <= budget), rel=0.05)
    assert trials.best(budget) == found


@pytest.mark.chapter("D15", api="lightning_distill.bit_search.evolve")
def test_nsga2_keeps_the_best_and_is_the_same_for_the_same_seed():
    pytest.importorskip("optuna")
    found = []
    for _ in range(2):
        trials = Trials(loss, COSTS)
        start = [trial.plan for trial in try_allocations(trials, layer_errors(trials), budgets_between(COSTS, 6))]
        before, count = quality(trials), len(trials)
        evolve(trials, 30, start=start, population=8, seed=3)
        assert count < len(trials) <= count + 30
        assert quality(trials) >= before
        found.append([trial.plan for trial in trials.done])
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="`evaluations` must be positive, got 0"):
        evolve(trials, 0)
    with pytest.raises(ValueError, match="`population` must be at least 2, got 1"):
        evolve(trials, 4, population=1)


def test_bad_budgets_are_refused():
    trials = Trials(loss, COSTS)
    with pytest.raises(ValueError, match="the cheapest plan costs 4500"):
        greedy(trials, 4400)
    with pytest.raises(ValueError, match="`plan` costs 9000, more than the budget of 8000"):
        refine(trials, dict.fromkeys(SIZES, 4), 8000)
    with pytest.raises(ValueError, match="No plan that was tried costs at most 10"):
        trials.best(10)
    with pytest.raises(ValueError, match="`points` must be at least 2, got 1"):
        budgets_between(COSTS, 1)
