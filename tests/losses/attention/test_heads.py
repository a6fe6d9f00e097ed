"""Alignment of heads, and heads that teach other heads."""

import itertools

import pytest
import torch

from lightning_distill.losses.attention import (
    align_heads,
    assign_heads,
    attention_js,
    attention_kl,
    attention_reverse_kl,
    head_costs,
    nearest_head_divergence,
)
from tests.losses.attention.test_rows import API, close, maps


@pytest.mark.chapter("A34", api=API + "assign_heads")
@pytest.mark.parametrize("name", ["head_alignment_hungarian", "head_alignment_rectangular"])
def test_assignment_matches_golden_and_every_other_costs_more(golden, name):
    case = golden(name)
    costs = case.inputs["cost"]
    found = assign_heads(costs)
    assert found.tolist() == case.expected["perm"].tolist()
    rows = torch.arange(len(costs))
    close(costs[rows, found].sum(), case.expected["total"])
    every = (costs[rows, list(p)].sum() for p in itertools.permutations(range(costs.shape[1]), len(costs)))
    assert min(every) >= costs[rows, found].sum() - 1e-12


@pytest.mark.chapter("A34")
def test_a_student_with_more_heads_gets_the_nearest_for_each():
    costs = torch.tensor([[1.0, 2.0], [3.0, 0.5], [0.1, 0.2]])
    assert assign_heads(costs).tolist() == [0, 1, 0]


@pytest.mark.chapter("A34", api=API + "align_heads")
@pytest.mark.parametrize("distance", [attention_kl, attention_js])
def test_costs_are_sums_over_the_rows_that_count_and_a_known_order_is_found(distance):
    student, teacher = maps(2, 3, 4, 4, seed=1), maps(2, 5, 4, 4, seed=2)
    counts = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    costs, number = head_costs(student, teacher, distance=distance, counts=counts)
    assert number == 6
    for i, j in itertools.product(range(3), range(5)):
        close(costs[i, j], distance(student[:, i], teacher[:, j])[counts].sum())
    order = torch.tensor([3, 0, 4, 2, 1])
    noisy = 0.99 * teacher[:, order] + 0.01 * maps(2, 5, 4, 4, seed=3)
    assert align_heads(noisy, teacher, distance=distance).tolist() == order.tolist()
    with pytest.raises(ValueError, match="of the same sequences"):
        head_costs(student, teacher[:, :, :3])


@pytest.mark.chapter("B22", api=API + "nearest_head_divergence")
def test_nearest_heads_match_golden(golden):
    case = golden("attention_self_kd_min")
    student, teacher = (case.inputs[name].unsqueeze(0) for name in ("A_student", "A_teacher"))
    values, nearest = nearest_head_divergence(student, teacher, direction="reverse")
    close(values.mean((0, 2)).sum(), case.expected["sum_min"])
    assert nearest.tolist() == case.expected["argmin"].tolist()
    close(nearest_head_divergence(student, teacher)[0].mean((0, 2)).sum(), case.expected["forward_sum_min"])


@pytest.mark.chapter("B22")
def test_more_teaching_heads_never_make_the_divergence_larger_and_only_the_learning_get_a_gradient():
    student, teacher = maps(3, 2, 4, 4, seed=1).requires_grad_(), maps(3, 6, 4, 4, seed=2).requires_grad_()
    for direction, divergence in (("forward", attention_kl), ("reverse", attention_reverse_kl)):
        means = []
        for number in range(1, 7):
            values, nearest = nearest_head_divergence(student, teacher[:, :number], direction=direction)
            assert torch.equal(values, divergence(student, teacher[:, nearest]))
            means.append(values.mean().item())
        assert means == sorted(means, reverse=True)
        assert means[-1] < means[0]
    values.sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    with pytest.raises(ValueError, match="`direction` must be 'forward' or 'reverse', got 'both'"):
        nearest_head_divergence(student, teacher, direction="both")
