"""Fronts and their quality, against brute force."""

import math
import random

import pytest

from lightning_distill.bit_search import (
    crowding_distance,
    epsilon_constraint,
    hypervolume,
    nondominated_fronts,
    pareto_front,
    weighted_sum,
)

API = "lightning_distill.bit_search."


def beats(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@pytest.mark.chapter("D15", api=API + "nondominated_fronts")
def test_fronts_and_room_are_the_golden_ones(golden):
    case = golden("nsga2_fronts")
    points = case.inputs["points_minimise"].tolist()
    fronts = nondominated_fronts(points)
    assert fronts == [[0, 1, 2], [3, 5], [4]] == [list(map(int, front)) for front in case.expected["fronts"]]
    assert crowding_distance([points[i] for i in fronts[0]]) == [math.inf, 2.0, math.inf]


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_a_front_is_beaten_by_nobody_and_each_later_one_by_somebody_of_the_front_before(objectives):
    draw = random.Random(objectives)
    points = [[draw.randint(0, 6) for _ in range(objectives)] for _ in range(40)]  # with ties
    fronts = nondominated_fronts(points)
    assert sorted(i for front in fronts for i in front) == list(range(40))
    for number, front in enumerate(fronts):
        assert not any(beats(points[j], points[i]) for i in front for j in front)
        if number:
            assert all(any(beats(points[j], points[i]) for j in fronts[number - 1]) for i in front)
    assert pareto_front(points) == [i for i, p in enumerate(points) if not any(beats(q, p) for q in points)]


def test_no_points_have_no_front():
    assert nondominated_fronts([]) == [] == pareto_front([]) == crowding_distance([])
    assert hypervolume([], [1, 1]) == 0
    with pytest.raises(ValueError, match="`points` must be a table of numbers of shape"):
        nondominated_fronts([[1.0, math.nan]])


@pytest.mark.chapter("D13", api=API + "hypervolume")
def test_hypervolume_is_the_golden_one_and_what_counting_cells_gives(golden):
    case = golden("hypervolume_2d")
    found = hypervolume(case.inputs["points_minimise"].tolist(), case.inputs["ref"].tolist())
    assert found == pytest.approx(case.expected["hypervolume"], rel=case.rtol)
    draw = random.Random(0)
    points = [[draw.randint(0, 6) for _ in range(3)] for _ in range(8)]  # 6 is no better than the reference
    cells = [(x, y, z) for x in range(6) for y in range(6) for z in range(6)]
    covered = sum(any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points) for cell in cells)
    assert hypervolume(points, [6, 6, 6]) == pytest.approx(covered)
    with pytest.raises(ValueError, match=r"shape \(points, 2\), got the shape \(8, 3\)"):
        hypervolume(points, [6, 6])


@pytest.mark.chapter("D14", api=API + "epsilon_constraint")
@pytest.mark.chapter("D13", api=API + "weighted_sum")
def test_a_limit_reaches_the_dent_of_the_front_and_a_weighted_sum_never_does(golden):
    case = golden("weighted_sum_vs_epsilon")
    points = case.inputs["points_acc_size_latency_loss"].tolist()
    limits = [None, case.inputs["eps_size"], case.inputs["eps_latency"]]
    assert epsilon_constraint(points, limits) == case.expected["epsilon_constraint"] == 2
    assert weighted_sum(points, [1, 0.02, 0.02]) == case.expected["weighted_sum_argmin"] == 1
    assert pareto_front(points) == [0, 1, 2, 3]
    dented = [[0.0, 1.0], [0.6, 0.6], [1.0, 0.0]]
    grid = [i / 200 for i in range(201)]
    assert {weighted_sum(dented, [w, 1 - w]) for w in grid} == {0, 2}
    assert epsilon_constraint(dented, [None, 0.7]) == 1
    assert epsilon_constraint(dented, [0.7, None], objective=1) == 1


def test_every_weighted_sum_with_positive_weights_is_on_the_front():
    draw = random.Random(1)
    points = [[draw.random() for _ in range(3)] for _ in range(50)]
    front = set(pareto_front(points))
    assert all(weighted_sum(points, [draw.random() + 0.01 for _ in range(3)]) in front for _ in range(100))


def test_bad_weights_and_limits_are_refused():
    with pytest.raises(ValueError, match=r"not negative and not all zero, got \[0, 0\]"):
        weighted_sum([[1, 2]], [0, 0])
    with pytest.raises(ValueError, match=r"least value of each objective is \[1\.0, 2\.0\]"):
        epsilon_constraint([[1, 2]], [None, 1])
    with pytest.raises(ValueError, match="no point to choose"):
        weighted_sum([], [1.0])
