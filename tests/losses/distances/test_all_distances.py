"""What must hold for every distance between features."""

import pytest
import torch

from lightning_distill.losses.distances import (
    CKA,
    DISTANCES,
    MMD,
    RKD,
    ContentPosition,
    Correlation,
    HierarchicalContext,
    LowRank,
    PooledSequence,
    Spectrum,
    cosine,
)
from lightning_distill.losses.lazy import Lazy

ALL = DISTANCES | {
    "cka_debiased": CKA(debiased=True),
    "mmd_linear": MMD(kernel="linear"),
    "mmd_poly": MMD(kernel="poly"),
    "mmd_fixed": MMD(sigma=1.5),
    "mmd_unbiased": MMD(unbiased=True),
    "mmd_positions": MMD(over="positions", sigma=1.5),
    "correlation_features": Correlation(over="features"),
    "bands": Spectrum(compare="complex", band_weights=(1.0, 0.5)),
    "low_rank": LowRank(rank=2),
    "pooled_mse": PooledSequence(2),
    "pooled_cosine": PooledSequence(2, cosine),
    "content_only": ContentPosition(position=0.0),
}
NOT_ZERO_AT_EQUALITY = {"vid", "crd"}
MAY_BE_NEGATIVE = {"vid", "mmd_unbiased", "cka_debiased"}
ANY_WIDTHS = {
    "attention_transfer",
    "correlation",
    "crd",
    "linear_cka",
    "cka_debiased",
    "neuron_selectivity",
    "probabilistic_transfer",
    "rkd",
    "similarity_preserving",
}
BETWEEN_SAMPLES = {
    "cka_debiased",
    "correlation",
    "correlation_features",
    "crd",
    "linear_cka",
    "mmd",
    "mmd_fixed",
    "mmd_linear",
    "mmd_poly",
    "mmd_unbiased",
    "probabilistic_transfer",
    "rkd",
    "similarity_preserving",
}


def over(names):
    return pytest.mark.parametrize("name", sorted(names))


def made(name, student, teacher):
    """The distance, with the same parameters every time."""
    distance = ALL[name]
    if isinstance(distance, Lazy):
        torch.manual_seed(0)
        distance = type(distance)(2) if isinstance(distance, LowRank) else type(distance)()
        distance.build(student.shape, teacher.shape)
        distance.to(student.dtype if student.dtype == torch.float64 else torch.float32)
    return distance


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(*shape):
    return features(*shape, seed=1), features(*shape, seed=2)


@over(ALL)
def test_shape_is_of_positions_samples_or_a_scalar(name):
    student, teacher = pair(6, 5, 4)
    value = made(name, student, teacher)(student, teacher)
    assert value.shape in {(6, 5), (6,), ()}
    assert value.dtype == torch.float64
    assert (value.ndim == 0) == (name in BETWEEN_SAMPLES)


@over(set(ALL) - NOT_ZERO_AT_EQUALITY)
def test_zero_at_equality_and_positive_elsewhere(name):
    student, teacher = pair(6, 5, 4)
    distance = made(name, student, teacher)
    if name != "mmd_unbiased":
        assert distance(teacher.clone(), teacher).abs().max() < 1e-9
    if name not in MAY_BE_NEGATIVE:
        assert distance(student, teacher).min() > 1e-6


@over(ALL)
def test_only_the_student_gets_a_gradient_and_it_is_that_of_finite_differences(name):
    student, teacher = (side.requires_grad_() for side in pair(5, 3, 4))
    distance = made(name, student, teacher)
    distance(student, teacher).sum().backward()
    assert (student.grad.flatten(1).abs().sum(1) > 0).all()
    assert teacher.grad is None
    if isinstance(distance, torch.nn.Module):
        distance.eval()  # a refreshed basis is no function of one input
    if name in {"mmd", "mmd_unbiased"}:
        return  # the median distance has no gradient
    detached = teacher.detach()
    assert torch.autograd.gradcheck(lambda s: distance(s, detached), student)


@over(ALL)
def test_masked_positions_change_nothing_and_get_no_gradient(name):
    student, teacher = pair(6, 5, 4)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[0, 3:] = mask[1, 1:] = mask[2, :2] = False
    distance = made(name, student, teacher)

    def value(s, t):
        values = made(name, s, t)(s, t, mask)
        return values.where(mask, 0) if values.shape == mask.shape else values

    noise = 1e3 * features(6, 5, 4, seed=5)
    noisy = [torch.where(mask[..., None], side, noise) for side in (student, teacher)]
    torch.testing.assert_close(value(*noisy), value(student, teacher))
    student = noisy[0].requires_grad_()
    values = distance(student, noisy[1], mask)
    (values.where(mask, 0) if values.shape == mask.shape else values).sum().backward()
    assert student.grad[~mask].abs().max() == 0
    assert student.grad[mask].abs().max() > 0


@over(ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("random", (6, 5, 4)),
        ("random", (1, 5, 4)),
        ("random", (2, 1, 4)),
        ("zero", (6, 5, 4)),
        ("student_zero", (6, 5, 4)),
        ("constant", (6, 5, 4)),
        ("equal", (6, 5, 4)),
        ("masked", (6, 5, 4)),
        ("large", (6, 5, 4)),
        ("vectors", (6, 4)),
    ],
)
def test_edges_are_finite_with_finite_gradients(name, kind, shape, dtype):
    if len(shape) == 2 and name in {
        "hierarchical_context",
        "spectrum",
        "bands",
        "neuron_selectivity",
        "content_position",
        "content_only",
        "pooled_mse",
        "pooled_cosine",
    }:
        pytest.skip("needs positions")
    student, teacher = (side.to(dtype) for side in pair(*shape))
    mask = None
    if kind == "zero":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    elif kind == "student_zero":
        student = torch.zeros_like(student)
    elif kind == "constant":
        student, teacher = torch.full_like(student, 1.3), torch.full_like(teacher, -0.7)
    elif kind == "equal":
        student = teacher.clone()
    elif kind == "large":
        student, teacher = 1e4 * student, 1e4 * teacher
    elif kind == "masked":
        mask = torch.zeros(shape[:-1], dtype=torch.bool)
    student.requires_grad_()
    value = made(name, student, teacher)(student, teacher, mask)
    assert value.isfinite().all()
    assert value.dtype == torch.float32
    value.sum().backward()
    assert student.grad.isfinite().all()
    if kind == "constant":
        assert student.grad.abs().max() < 1e3


@over(ALL)
def test_autocast_changes_nothing(name):
    student, teacher = (side.float() for side in pair(6, 5, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made(name, student, teacher)(student, teacher)
    outside = made(name, student, teacher)(student, teacher)
    if name == "crd":  # its projections are layers like any other
        torch.testing.assert_close(inside, outside, rtol=0.05, atol=0.05)
    else:
        assert torch.equal(inside, outside)


@over(ANY_WIDTHS)
def test_takes_any_two_widths(name):
    student, teacher = features(6, 5, 3, seed=1), features(6, 5, 4, seed=2)
    assert made(name, student, teacher)(student, teacher).isfinite().all()


@over(set(ALL) - ANY_WIDTHS - {"pooled_mse", "pooled_cosine"})
def test_other_widths_are_refused_with_both_sizes_and_a_way_out(name):
    student, teacher = features(6, 5, 3, seed=1), features(6, 5, 4, seed=2)
    with pytest.raises(ValueError, match=r"(?s)3.*4.*`transform='linear'`"):
        made(name, student, teacher)(student, teacher)


@over(BETWEEN_SAMPLES)
def test_samples_without_positions_are_left_out(name):
    student, teacher = pair(7, 5, 4)
    mask = torch.ones(7, 5, dtype=torch.bool)
    mask[3] = False
    kept = [0, 1, 2, 4, 5, 6]
    whole = made(name, student, teacher)(student, teacher, mask)
    rest = made(name, student, teacher)(student[kept], teacher[kept])
    if name == "similarity_preserving":  # its matrix keeps the row, as zeros
        torch.testing.assert_close(whole * 49, rest * 36)
    else:
        torch.testing.assert_close(whole, rest)


@over(BETWEEN_SAMPLES - {"crd"})
def test_order_of_the_samples_does_not_matter(name):
    student, teacher = pair(6, 5, 4)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    distance = made(name, student, teacher)
    torch.testing.assert_close(distance(student[order], teacher[order]), distance(student, teacher))


@over(set(ALL) - {"content_position", "content_only", "pooled_mse", "pooled_cosine"})
def test_takes_maps(name):
    student, teacher = pair(4, 6, 5, 3)
    value = made(name, student, teacher)(student, teacher)
    assert value.shape in {(4, 6, 5), (4,), ()}
    assert value.isfinite().all()


@pytest.mark.parametrize("levels", [(), (0,), (2, -1)])
def test_hierarchical_context_refuses_levels(levels):
    with pytest.raises(ValueError, match="`levels` must be one or more positive numbers of bins"):
        HierarchicalContext(levels=levels)


def test_rkd_refuses_a_negative_weight():
    with pytest.raises(ValueError, match="`angle` must not be negative, got -1"):
        RKD(angle=-1.0)
