"""Relations within items and within classes against Pearson's correlation in SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import pearsonr

from lightning_distill.losses import DIST, inter_class_distance, intra_class_distance, reduce_items
from lightning_distill.outputs import Outputs, Step


def logits(seed, shape=(6, 4)):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rows(first, second):
    return np.array([1 - pearsonr(a, b).statistic for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_matches_pearsons_correlation(temperature):
    student, teacher = logits(1), logits(2)
    q, p = (softmax(z.numpy() / temperature, axis=-1) for z in (student, teacher))
    inter, intra = temperature**2 * rows(q, p), temperature**2 * rows(q.T, p.T).mean()
    t = {"temperature": temperature}
    np.testing.assert_allclose(inter_class_distance(student, teacher, **t), inter, rtol=1e-9)
    np.testing.assert_allclose(intra_class_distance(student, teacher, **t), intra, rtol=1e-9)
    step = Step(None, Outputs(student), Outputs(teacher), temperature=temperature)
    np.testing.assert_allclose(reduce_items(DIST(beta=2.0, gamma=3.0)(step)), 2 * inter.mean() + 3 * intra, rtol=1e-9)


def correlation(first, second):
    return torch.nn.functional.cosine_similarity(
        first - first.mean(-1, keepdim=True), second - second.mean(-1, keepdim=True)
    )


def test_without_the_factor_the_gradient_tends_to_that_of_the_logits_correlation():
    """So it does not fade at high temperature, and the factor T^2 makes it grow."""
    student, teacher = logits(1).requires_grad_(), logits(2)
    step = Step(None, Outputs(student), Outputs(teacher), temperature=1e4)
    (hot,) = torch.autograd.grad(DIST(scale_by_t2=False)(step).mean(), student)
    (scaled,) = torch.autograd.grad(DIST()(step).mean(), student)
    q, p = (z - z.mean(-1, keepdim=True) for z in (student, teacher))  # softmax does not see an item's level
    (limit,) = torch.autograd.grad((1 - correlation(q, p)).mean() + (1 - correlation(q.T, p.T)).mean(), student)
    torch.testing.assert_close(hot, limit, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(scaled, 1e8 * hot)


def test_masked_items_take_no_part():
    student, teacher = logits(1, (2, 3, 4)), logits(2, (2, 3, 4))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    temperature = torch.rand(2, 3, dtype=torch.float64) + 1
    step = Step(None, Outputs(student), Outputs(teacher), mask=mask, temperature=temperature)
    kept = Step(None, Outputs(student[mask]), Outputs(teacher[mask]), temperature=temperature[mask])
    torch.testing.assert_close(reduce_items(DIST()(step), mask), reduce_items(DIST()(kept)))
    student[~mask] = 100.0
    torch.testing.assert_close(reduce_items(DIST()(step), mask), reduce_items(DIST()(kept)))


def test_level_and_spread_of_the_probabilities_do_not_matter():
    teacher = logits(2).softmax(-1)
    student = (0.5 * teacher + 0.5 / 4).log()
    assert inter_class_distance(student, teacher.log()).abs().max() < 1e-12
    assert intra_class_distance(student, teacher.log()).abs() < 1e-12


@pytest.mark.parametrize("classes", [3, 7, 10])
def test_predictions_without_ranking(classes):
    """A uniform teacher has nothing to teach; a uniform student is uncorrelated, and is left alone."""
    uniform = torch.zeros(5, classes)
    other = torch.randn(5, classes)
    student = other.clone().requires_grad_()
    values = inter_class_distance(student, uniform)
    assert torch.equal(values, torch.zeros(5))
    values.sum().backward()
    assert student.grad.abs().max() == 0
    student = uniform.clone().requires_grad_()
    values = inter_class_distance(student, other)
    assert torch.equal(values, torch.ones(5))
    values.sum().backward()
    assert student.grad.abs().max() == 0


@pytest.mark.parametrize("items", [0, 1])
def test_too_few_items_to_compare(items):
    student = torch.randn(items, 4, requires_grad=True)
    value = intra_class_distance(student, torch.randn(items, 4))
    assert value == 0
    value.backward()
    assert student.grad.abs().sum() == 0


def test_tiny_probabilities_still_correlate():
    """Squares of 1e-30 are 0 in float32."""
    teacher = torch.tensor([[0.0, -70.0], [0.0, -71.0], [0.0, -72.0]])
    assert intra_class_distance(teacher.flip(0), teacher) > 0.5
    torch.testing.assert_close(
        intra_class_distance(teacher.flip(0), teacher).double(),
        intra_class_distance(teacher.flip(0).double(), teacher.double()),
        rtol=0,
        atol=1e-5,
    )


def test_refuses_a_negative_weight():
    with pytest.raises(ValueError, match="`gamma` must not be negative, got -1"):
        DIST(gamma=-1)
