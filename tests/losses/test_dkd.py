"""Decoupled distillation against the paper's definition in NumPy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from lightning_distill.losses import (
    DKD,
    decoupled_divergence,
    kl_divergence,
    non_target_divergence,
    target_divergence,
)
from lightning_distill.outputs import Outputs, Step

LABELS = torch.tensor([0, 4, 2, 1, 4])  # the first and the last class too


def logits(seed, shape=(5, 5)):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definition(student, teacher, labels, temperature):
    """Zhao et al. (2022), section 3.1, one sample after the other."""
    target, non_target = [], []
    for z_s, z_t, label in zip(student.numpy(), teacher.numpy(), labels.tolist(), strict=True):
        q, p = softmax(z_s / temperature), softmax(z_t / temperature)
        target.append(rel_entr([p[label], 1 - p[label]], [q[label], 1 - q[label]]).sum())
        p_rest, q_rest = np.delete(p, label), np.delete(q, label)
        non_target.append(rel_entr(p_rest / p_rest.sum(), q_rest / q_rest.sum()).sum())
    return temperature**2 * np.array(target), temperature**2 * np.array(non_target)


@pytest.mark.chapter("A06", api="lightning_distill.losses.DKD")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_matches_the_paper(temperature):
    student, teacher = logits(1), logits(2)
    target, non_target = definition(student, teacher, LABELS, temperature)
    t = {"temperature": temperature}
    np.testing.assert_allclose(target_divergence(student, teacher, LABELS, **t), target, rtol=1e-9)
    np.testing.assert_allclose(non_target_divergence(student, teacher, LABELS, **t), non_target, rtol=1e-9)
    step = Step(None, Outputs(student), Outputs(teacher), labels=LABELS, temperature=temperature)
    np.testing.assert_allclose(DKD()(step), target + 8 * non_target, rtol=1e-9)
    np.testing.assert_allclose(DKD(alpha=0.5, beta=2.0)(step), 0.5 * target + 2 * non_target, rtol=1e-9)


@pytest.mark.chapter("A06")
def test_the_parts_add_up_to_the_divergence():
    """Zhao et al. (2022), section 3.1: KL = TCKD + (1 - p_t) NCKD."""
    student, teacher = logits(1), logits(2)
    rest = 1 - teacher.softmax(-1).gather(-1, LABELS[:, None])[:, 0]
    parts = target_divergence(student, teacher, LABELS) + rest * non_target_divergence(student, teacher, LABELS)
    torch.testing.assert_close(parts, kl_divergence(student, teacher))


def test_unlabelled_items_add_nothing_and_change_nothing():
    student, teacher = logits(1).requires_grad_(), logits(2)
    some = LABELS.clone()
    some[1] = -100
    values = decoupled_divergence(student, teacher, some)
    torch.testing.assert_close(values[[0, 2, 3, 4]], decoupled_divergence(student, teacher, LABELS)[[0, 2, 3, 4]])
    assert values[1] == 0
    values.sum().backward()
    assert student.grad[1].abs().sum() == 0
    assert (student.grad[[0, 2, 3, 4]].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("labels", [None, torch.full((5,), -100)], ids=["None", "-100"])
def test_a_batch_without_labels_gives_zeros_that_can_be_stepped_on(labels):
    student = logits(1).requires_grad_()
    values = DKD()(Step(None, Outputs(student), Outputs(logits(2)), labels=labels))
    assert torch.equal(values, torch.zeros(5, dtype=torch.float64))
    values.mean().backward()
    assert student.grad.abs().sum() == 0


def test_with_two_classes_only_the_target_is_left():
    student, teacher, labels = logits(1, (4, 2)), logits(2, (4, 2)), torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(target_divergence(student, teacher, labels), kl_divergence(student, teacher))
    assert non_target_divergence(student, teacher, labels).abs().max() == 0


def test_a_sure_network_keeps_its_gradient():
    """1 - p_t is 2e-13 here, which is 0 when it is computed from p_t in float32."""
    student = torch.tensor([[30.0, 0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 0.0]])
    value = target_divergence(student, teacher, torch.tensor([0]))
    value.backward()
    expected, _ = definition(student.detach().double(), teacher.double(), torch.tensor([0]), 1.0)
    assert value.item() == pytest.approx(expected[0], rel=1e-3)  # the oracle itself rounds 1 - p_t
    assert student.grad[0, 0].item() == pytest.approx(1 - 1 / (2 + math.e), rel=1e-5)


def test_errors_name_the_fix():
    student, teacher = logits(1), logits(2)
    with pytest.raises(ValueError, match=r"class probabilities, but decoupled .* Use `SoftTargets`"):
        decoupled_divergence(student, teacher, torch.ones(5, 5))
    with pytest.raises(ValueError, match=r"`labels` have shape \(4,\), expected one class index per item: \(5,\)"):
        decoupled_divergence(student, teacher, LABELS[:4])
    with pytest.raises(ValueError, match="`beta` must not be negative, got -1"):
        DKD(beta=-1)
    with pytest.raises(ValueError, match="`alpha` must not be negative, got nan"):
        DKD(alpha=math.nan)
