"""The integer programme, against all plans."""

import itertools
import random

import pytest

from lightning_distill.bit_search import accuracy_size_reward, allocate_bits, plan_sum, weight_bits

API = "lightning_distill.bit_search."


def all_plans(table):
    return [dict(zip(table, bits, strict=True)) for bits in itertools.product(*(row for row in table.values()))]


def golden_problem(case):
    by_bits = case.inputs["err_by_bits"]
    layers = ["a", "b", "c"]
    errors = {layer: {int(b): by_bits[b][i].item() for b in by_bits} for i, layer in enumerate(layers)}
    sizes = {layer: int(case.inputs["params"][i]) for i, layer in enumerate(layers)}
    return errors, sizes


@pytest.mark.chapter("D16", api=API + "allocate_bits")
def test_allocation_is_the_golden_one(golden):
    case = golden("bit_allocation_budget")
    errors, sizes = golden_problem(case)
    costs = weight_bits(sizes, (2, 4, 8))
    plan = allocate_bits(errors, costs, case.inputs["budget_bits"])
    assert list(plan.values()) == case.expected["bits"].tolist() == [8, 4, 4]
    assert plan_sum(plan, errors) == pytest.approx(case.expected["total_error"], rel=case.rtol)
    assert plan_sum(plan, costs) == case.expected["used_bits"]


@pytest.mark.erratum("ERR-59")
@pytest.mark.chapter("D16")
def test_the_least_error_of_each_layer_is_always_at_the_most_bits(golden):
    case = golden("bit_allocation_budget")
    errors, sizes = golden_problem(case)
    printed = [min(row, key=row.get) for row in errors.values()]
    assert printed == case.expected["as_written_argmin"].tolist() == [8, 8, 8]
    unlimited = allocate_bits(errors, weight_bits(sizes, (2, 4, 8)), 8 * sum(sizes.values()))
    assert list(unlimited.values()) == printed


@pytest.mark.parametrize("seed", range(12))
def test_allocation_is_the_best_of_all_plans(seed):
    draw = random.Random(seed)
    choices = (2, 3, 4, 8)[: draw.randint(2, 4)]
    sizes = {f"layer {i}": draw.randint(1, 5000) for i in range(5)}
    scale = 10 ** draw.uniform(-9, 5)  # whatever the unit of the error is
    errors = {layer: {b: scale * draw.random() * 4.0**-b for b in choices} for layer in sizes}
    costs = weight_bits(sizes, choices)
    plans = all_plans(errors)
    for share in (0.0, 0.1, 0.45, 0.8, 1.0):
        low, high = 2 * sum(sizes.values()), choices[-1] * sum(sizes.values())
        budget = low + share * (high - low)
        plan = allocate_bits(errors, costs, budget)
        assert list(plan) == list(errors)
        assert plan_sum(plan, costs) <= budget
        best = min(plan_sum(p, errors) for p in plans if plan_sum(p, costs) <= budget)
        assert plan_sum(plan, errors) == pytest.approx(best, rel=1e-6, abs=1e-8 * scale)


def test_small_differences_count_beside_large_ones():
    errors = {"a": {2: 5.0, 4: 0.0}, "b": {2: 1e-7, 4: 0.0}, "c": {2: 3e-7, 4: 0.0}}
    costs = weight_bits({"a": 10, "b": 10, "c": 10}, (2, 4))
    assert allocate_bits(errors, costs, 100) == {"a": 4, "b": 2, "c": 4}
    errors["b"][2], errors["c"][2] = errors["c"][2], errors["b"][2]
    assert allocate_bits(errors, costs, 100) == {"a": 4, "b": 4, "c": 2}


def test_of_equal_plans_the_cheapest_is_taken_and_costs_may_be_anything():
    errors = {"a": {4: 0.0, 8: 0.0}, "b": {4: 1.0, 8: 0.5}}
    assert allocate_bits(errors, weight_bits({"a": 3, "b": 3}, (4, 8)), 1000) == {"a": 4, "b": 8}
    seconds = {"a": {4: 2e-6, 8: 1e-6}, "b": {4: 5e-6, 8: 9e-6}}  # fewer bits may be slower
    assert allocate_bits(errors, seconds, 1e-5) == {"a": 8, "b": 8}
    assert allocate_bits(errors, seconds, 7e-6) == {"a": 8, "b": 4}


def test_bad_tables_and_budgets_are_refused():
    errors, costs = {"a": {2: 1.0, 4: 0.0}}, weight_bits({"a": 10}, (2, 4))
    with pytest.raises(ValueError, match="`budget` is 19, but the cheapest plan costs 20"):
        allocate_bits(errors, costs, 19)
    with pytest.raises(ValueError, match="`budget` is nan"):
        allocate_bits(errors, costs, float("nan"))
    with pytest.raises(ValueError, match="the same layers and numbers of bits"):
        allocate_bits(errors, weight_bits({"b": 10}, (2, 4)), 40)
    with pytest.raises(ValueError, match=r"`errors` of 'a' at 2 bits must be finite, got inf"):
        allocate_bits({"a": {2: float("inf"), 4: 0.0}}, costs, 40)
    with pytest.raises(ValueError, match="at least one layer"):
        allocate_bits({}, {}, 1)


@pytest.mark.chapter("D18", api=API + "accuracy_size_reward")
def test_reward_is_the_golden_one(golden):
    case = golden("mixed_precision_score")
    accuracies, sizes = case.inputs["acc"].tolist(), case.inputs["size_mb"].tolist()
    target, exponent = case.inputs["target_mb"], case.inputs["w"]
    found = [
        accuracy_size_reward(a, s, target=target, exponent=exponent) for a, s in zip(accuracies, sizes, strict=True)
    ]
    assert found == pytest.approx(case.expected["mnas"].tolist(), rel=case.rtol)
    assert found.index(max(found)) == case.expected["mnas_argmax"] == 1


@pytest.mark.erratum("ERR-60")
@pytest.mark.chapter("D18")
def test_accuracy_over_size_always_prefers_the_smallest_model(golden):
    case = golden("mixed_precision_score")
    ratio = case.inputs["acc"] / case.inputs["size_mb"]
    assert int(ratio.argmax()) == case.expected["ratio_argmax"] == 2
    assert 0.901 / 2 > 0.929 / 4  # measured on the digits: uniform 2 and 4 bits
    rewards = [accuracy_size_reward(a, s, target=4) for a, s in ((0.901, 2), (0.929, 4))]
    assert rewards[0] / rewards[1] < 0.901 / 0.929 * 1.06  # half the size is worth five per cent, not a hundred


def test_rewards_outside_their_range_are_refused():
    with pytest.raises(ValueError, match=r"`accuracy` must be in \[0, 1\], got 74"):
        accuracy_size_reward(74, 4, target=4)
    with pytest.raises(ValueError, match="`size` must be positive, got 0"):
        accuracy_size_reward(0.7, 0, target=4)
    with pytest.raises(ValueError, match="`exponent` must not be positive"):
        accuracy_size_reward(0.7, 1, target=4, exponent=0.1)
