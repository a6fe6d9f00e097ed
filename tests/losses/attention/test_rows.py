"""Distances between rows of attention maps."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance

from lightning_distill.losses.attention import (
    ROW_DISTANCES,
    LocalGlobal,
    SparseAttention,
    attention_js,
    attention_kl,
    attention_mse,
    attention_reverse_kl,
    attention_wasserstein,
    local_global_parts,
    smooth_attention,
    sparse_attention,
    sparse_thresholds,
)

API = "lightning_distill.losses.attention."
ALL = ROW_DISTANCES | {"local_global": LocalGlobal(window=1, mass_weight=1.0)}


def maps(*shape, seed=0, forbidden=None):
    scores = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (scores if forbidden is None else scores.masked_fill(forbidden, -math.inf)).softmax(dim=-1)


def pair(*shape, **more):
    return maps(*shape, seed=1, **more), maps(*shape, seed=2, **more)


def close(value, expected, rtol=1e-9, atol=1e-11):
    value, expected = (torch.as_tensor(side, dtype=torch.float64) for side in (value, expected))
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


@pytest.mark.chapter("A29", api=API + "attention_mse")
def test_squared_difference_matches_golden(golden):
    case = golden("attention_map_sum")
    values = attention_mse(case.inputs["A_S"], case.inputs["A_T"])
    close(values.mean(), case.expected["mean"])
    layers, heads = case.inputs["A_S"].shape[0], case.inputs["A_S"].shape[-3]
    close(values.mean() * layers * heads, case.expected["sum_LH_mean_rows"])


@pytest.mark.chapter("A30", api=API + "attention_kl")
def test_kl_matches_golden_and_scipy(golden):
    case = golden("attention_kl")
    values = attention_kl(case.inputs["A_S"], case.inputs["A_T"])
    close(values.sum(), case.expected["sum"])
    close(values.mean(), case.expected["mean_row"])
    student, teacher = pair(3, 5)
    close(attention_kl(student, teacher), rel_entr(teacher.numpy(), student.numpy()).sum(-1))
    close(attention_reverse_kl(student, teacher), rel_entr(student.numpy(), teacher.numpy()).sum(-1))


@pytest.mark.chapter("A31", api=API + "attention_js")
def test_js_matches_golden_and_scipy_and_has_a_bound(golden):
    case = golden("attention_js")
    close(attention_js(case.inputs["A_S"], case.inputs["A_T"]).mean(), case.expected["mean_row"])
    student, teacher = pair(4, 5)
    expected = [jensenshannon(s, t) ** 2 for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    close(attention_js(student, teacher), torch.tensor(expected))
    close(attention_js(teacher, student), attention_js(student, teacher))
    close(attention_js(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])), case.expected["bound"], rtol=1e-6)


@pytest.mark.chapter("A32", api=API + "attention_wasserstein")
def test_wasserstein_matches_golden_and_scipy(golden):
    case = golden("attention_wasserstein")
    values = attention_wasserstein(case.inputs["A_S"], case.inputs["A_T"], normalize=False)
    close(values.mean(), case.expected["mean_row"])
    close(values.flatten()[:4], case.expected["first"])
    student, teacher = pair(3, 6)
    position = np.arange(6)
    expected = [wasserstein_distance(position, position, s, t) for s, t in zip(student, teacher, strict=True)]
    close(attention_wasserstein(student, teacher), torch.tensor(expected) / 5)
    seen = torch.tensor([True] * 4 + [False] * 2)
    close(attention_wasserstein(student, teacher, seen), torch.tensor(expected) / 3)


@pytest.mark.chapter("A32")
def test_moving_all_attention_by_some_positions_costs_as_many():
    point = torch.eye(6)
    for shift in range(6):
        assert attention_wasserstein(point[shift], point[0], normalize=False) == shift
    assert attention_wasserstein(point[5], point[0]) == 1


@pytest.mark.chapter("A33", api=API + "smooth_attention")
def test_smoothing_matches_golden_and_keeps_what_is_forbidden(golden):
    case = golden("attention_smoothing")
    smooth = smooth_attention(case.inputs["A"], eps=1e-4)
    close(smooth, case.expected["A_smooth"])
    disjoint = [smooth_attention(torch.eye(4, dtype=torch.float64)[i], eps=1e-4) for i in (0, 1)]
    close(attention_kl(disjoint[1], disjoint[0]), case.expected["kl_disjoint"])
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    causal = smooth_attention(maps(4, 4, forbidden=~visible), eps=0.1, visible=visible)
    close(causal.sum(-1), torch.ones(4))
    assert causal[~visible].abs().max() == 0
    close(smooth_attention(torch.ones(1, 2), visible=torch.zeros(1, 2).bool()), torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"`eps`, the share of uniform attention, must be in \[0, 1\], got 1.5"):
        smooth_attention(causal, eps=1.5)


@pytest.mark.chapter("A33")
@pytest.mark.erratum("ERR-14")
def test_the_printed_smoothing_is_nothing_in_half_precision_and_leaves_single_precision_unnormalized():
    """Printed: (1 - eps) A + eps / n with eps = 1e-8, n the number of all keys."""
    eps = 1e-8
    assert torch.tensor(eps, dtype=torch.float16) == 0
    assert 1 - torch.tensor(eps, dtype=torch.float32) == 1
    half = (1 - eps) * torch.eye(4, dtype=torch.float16) + torch.tensor(eps / 4, dtype=torch.float16)
    assert (half == 0).any()  # the divergence is still infinite
    ours = smooth_attention(torch.eye(4, dtype=torch.float16))
    assert ours.dtype == torch.float32
    assert ours.min() > 1e-5
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    causal = maps(4, 4, forbidden=~visible)
    printed = (1 - 0.1) * causal + 0.1 / 4
    assert printed[0, 1:].sum() > 0.07  # the first token looks at the future
    assert smooth_attention(causal, eps=0.1, visible=visible)[0, 1:].sum() == 0


@pytest.mark.chapter("A35", api=API + "local_global_parts")
def test_local_and_global_parts_match_golden_and_make_up_the_whole(golden):
    case = golden("attention_local_global")
    student, teacher = case.inputs["A_S"], case.inputs["A_T"]
    parts = local_global_parts(student, teacher, window=1)
    close(parts.local.mean(), case.expected["local"])
    close(parts.distant.mean(), case.expected["glob"])
    close(parts.mass.mean(), case.expected["mass_kl"])
    close(LocalGlobal(window=1, alpha=0.6)(student, teacher).mean(), case.expected["total"])
    whole = parts.mass + parts.share * parts.local + (1 - parts.share) * parts.distant
    close(whole, case.expected["chain_rule_rows"])
    close(whole, case.expected["full_kl_rows"])
    close(whole, attention_kl(student, teacher))


@pytest.mark.chapter("A35")
@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_chain_rule_holds_for_causal_maps_and_for_fewer_queries_than_keys(window):
    future = torch.ones(6, 6, dtype=torch.bool).triu(1)
    student, teacher = pair(2, 6, 6, forbidden=future)
    for rows in (slice(None), slice(4, None)):
        s, t = student[:, rows], teacher[:, rows]
        parts = local_global_parts(s, t, window=window)
        whole = parts.mass + parts.share * parts.local + (1 - parts.share) * parts.distant
        close(whole, attention_kl(s, t))
        assert min(part.min() for part in (parts.mass, parts.local, parts.distant)) > -1e-12
    close(parts.local, local_global_parts(student, teacher, window=window).local[:, 4:])
    with pytest.raises(ValueError, match="`window` must not be negative, got -1"):
        local_global_parts(student, teacher, window=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": -1}, "`window` must not be negative, got -1"),
        ({"alpha": 1.1}, r"`alpha`, the weight of the neighbours, must be in \[0, 1\], got 1.1"),
        ({"mass_weight": -0.1}, "`mass_weight` must not be negative, got -0.1"),
    ],
)
def test_local_global_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalGlobal(**arguments)


@pytest.mark.chapter("A44", api=API + "sparse_attention")
def test_sparse_distance_matches_golden(golden):
    case = golden("sparse_attention_distance")
    student, teacher = case.inputs["A_S"], case.inputs["A_T"]
    close(sparse_attention(student, teacher, threshold=0.1).sum(), case.expected["sum"])
    close(SparseAttention(-1.0)(student, teacher).sum(), case.expected["full_l1"])
    assert (teacher > 0.1).sum() == case.expected["count"]


@pytest.mark.chapter("A45", api=API + "sparse_thresholds")
def test_thresholds_match_golden(golden):
    case = golden("sparse_threshold_layerwise")
    close(torch.tensor(sparse_thresholds(4, 0.01, 1.0), dtype=torch.float64), case.expected["eps"])
    assert sparse_thresholds(3, 0.02, 0.5)[-1] == pytest.approx(0.03)
    with pytest.raises(ValueError, match="`layers` must be positive, got 0"):
        sparse_thresholds(0)


@pytest.mark.parametrize("name", sorted(ALL))
def test_zero_at_equality_positive_elsewhere_and_blind_to_forbidden_keys(name):
    forbidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    student, teacher = pair(2, 3, 5, 5, forbidden=forbidden)
    distance = ALL[name]
    close(distance(teacher.clone(), teacher), torch.zeros(2, 3, 5), atol=1e-12)
    assert distance(student, teacher)[..., 2:].min() > 1e-4
    padded = [torch.nn.functional.pad(side, (0, 4)) for side in (student, teacher)]
    if name != "local_global":  # which puts the queries at the end
        visible = torch.nn.functional.pad(~forbidden, (0, 4))
        close(distance(*padded, visible), distance(student, teacher, ~forbidden))


@pytest.mark.parametrize("name", sorted(ALL))
def test_gradient_is_that_of_finite_differences_and_the_students_alone(name):
    student, teacher = (side.requires_grad_() for side in pair(2, 4, 4))
    ALL[name](student, teacher).sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda s: ALL[name](s, teacher.detach()), student)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_ones_and_empty_rows_are_finite(name, dtype):
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    for teacher in (rows, rows.roll(1, 0), torch.zeros(4, 3)):
        student = rows.clone().to(dtype).requires_grad_()
        value = ALL[name](student[:, None], teacher.to(dtype)[:, None])
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        value.sum().backward()
        if dtype != torch.float16:  # its gradients end at 65504, whatever the loss
            assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(ALL))
def test_other_shapes_are_refused_with_a_way_out(name):
    with pytest.raises(ValueError, match=r"(?s)\(2, 4, 4\).*\(3, 4, 4\).*`heads='aligned'`"):
        ALL[name](maps(2, 4, 4), maps(3, 4, 4))
