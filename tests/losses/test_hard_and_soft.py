"""Both losses at once are the two losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_distill.losses import cross_entropy, kl_divergence
from lightning_distill.losses.hard_and_soft import hard_and_soft

WEIGHTS = {"hard_weight": 0.3, "soft_weight": 0.7}


def logits(*shape, seed=0, dtype=torch.float64):
    return (3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).to(dtype)


def labels_of(kind, *items, classes=5):
    indices = torch.arange(math.prod(items)).reshape(items) % classes
    if kind == "probabilities":
        return logits(*items, classes, seed=3).softmax(-1)
    if kind == "some":
        indices.view(-1)[::3] = -100
    if kind == "none":
        indices.fill_(-100)
    return indices


def apart(student, teacher, labels, temperature, *, label_smoothing=0.0, scale_by_t2=True):
    """The means of the values per item."""
    hard = cross_entropy(student, labels, label_smoothing=label_smoothing).mean()
    soft = kl_divergence(student, teacher, temperature=temperature, scale_by_t2=scale_by_t2).mean()
    return 0.3 * hard + 0.7 * soft, hard, soft


def gradient(loss, student):
    return torch.autograd.grad(loss, student, retain_graph=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 4.0, 1000.0])
@pytest.mark.parametrize("kind", ["all", "some", "none", "probabilities"])
@pytest.mark.parametrize("items", [(1,), (9,), (3, 4), ()], ids=str)
def test_equals_the_losses_of_the_items(items, kind, temperature, dtype):
    student, teacher = logits(*items, 5, seed=1, dtype=dtype).requires_grad_(), logits(*items, 5, seed=2, dtype=dtype)
    labels = labels_of(kind, *items)
    found = hard_and_soft(student, teacher, labels, temperature=temperature, **WEIGHTS)
    expected = apart(student, teacher, labels, temperature)
    rounding = torch.finfo(dtype).eps * max(temperature, 1)  # of a divergence near 0, which is magnified by T ** 2
    for one, other in zip(found, expected, strict=True):
        assert one.shape == ()
        torch.testing.assert_close(one, other, rtol=1e-6, atol=rounding * max(temperature, 1))
    torch.testing.assert_close(gradient(found[0], student), gradient(expected[0], student), rtol=1e-6, atol=rounding)
    assert not found[1].requires_grad
    assert not found[2].requires_grad


@pytest.mark.parametrize("how", [{"label_smoothing": 0.1}, {"scale_by_t2": False}], ids=str)
@pytest.mark.parametrize("kind", ["some", "probabilities"])
def test_passes_on_how_each_is_computed(how, kind):
    student, teacher, labels = logits(9, 5, seed=1).requires_grad_(), logits(9, 5, seed=2), labels_of(kind, 9)
    found = hard_and_soft(student, teacher, labels, temperature=3.0, **WEIGHTS, **how)
    expected = apart(student, teacher, labels, 3.0, **how)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(gradient(found[0], student), gradient(expected[0], student))


@pytest.mark.parametrize("kind", ["some", "probabilities"])
def test_first_and_second_derivatives_are_those_of_finite_differences(kind):
    student, teacher, labels = (
        logits(3, 4, seed=1).requires_grad_(),
        logits(3, 4, seed=2),
        labels_of(kind, 3, classes=4),
    )

    def total(student):
        return hard_and_soft(student, teacher, labels, temperature=2.0, **WEIGHTS)[0]

    assert torch.autograd.gradcheck(total, student)
    assert torch.autograd.gradgradcheck(total, student)


def test_only_the_student_gets_a_gradient():
    student, teacher = logits(8, 5, seed=1).requires_grad_(), logits(8, 5, seed=2).requires_grad_()
    hard_and_soft(student, teacher, labels_of("all", 8), temperature=2.0, **WEIGHTS)[0].backward()
    assert (student.grad.abs().sum(-1) > 0).all()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
def test_finite_at_the_ends(temperature, dtype):
    big = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 9984.0], [1e4, 1e4, 1e4], [0.0, 0.0, 1.0]])
    for one, other in ((big, big.roll(1, -1)), (big, torch.zeros(4, 3)), (torch.zeros(4, 3), big), (big, big)):
        student = one.to(dtype).requires_grad_()
        found = hard_and_soft(
            student, other.to(dtype), torch.tensor([0, 1, 2, -100]), temperature=temperature, **WEIGHTS
        )
        assert all(value.isfinite() and value.dtype == torch.float32 for value in found)
        found[0].backward()
        if dtype != torch.float16:  # its gradients end at 65504, whatever the loss
            assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype):
    teacher = logits(8, 1000).to(dtype)
    student = (teacher + 0.3 * logits(8, 1000, seed=1)).to(dtype)
    labels = labels_of("all", 8)
    exact = hard_and_soft(student.double(), teacher.double(), labels, temperature=2.0, **WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = hard_and_soft(student, teacher, labels, temperature=2.0, **WEIGHTS)
    for one, other in zip(half, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-6)


def test_a_batch_without_items_has_a_loss_of_zero():
    student = torch.zeros(0, 5, requires_grad=True)
    found = hard_and_soft(student, torch.zeros(0, 5), torch.zeros(0).long(), temperature=2.0, **WEIGHTS)
    assert [value.item() for value in found] == [0, 0, 0]
    found[0].backward()
    assert student.grad.shape == (0, 5)


def test_compiles_into_one_graph():
    student, teacher, labels = logits(8, 5, seed=1).requires_grad_(), logits(8, 5, seed=2), labels_of("some", 8)
    compiled = torch.compile(hard_and_soft, fullgraph=True, backend="aot_eager")
    found, expected = (f(student, teacher, labels, temperature=2.0, **WEIGHTS)[0] for f in (compiled, hard_and_soft))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, student), gradient(expected, student))


def test_equals_a_loss_written_by_hand():
    student, teacher, labels = logits(8, 5, seed=1), logits(8, 5, seed=2), labels_of("all", 8)
    p, q = (torch.softmax(side / 4, -1) for side in (teacher, student))
    soft = 16 * (p * (p / q).log()).sum() / 8
    hard = -(torch.softmax(student, -1)[torch.arange(8), labels]).log().mean()
    found = hard_and_soft(student, teacher, labels, temperature=4.0, **WEIGHTS)
    torch.testing.assert_close(torch.stack(found), torch.stack([0.3 * hard + 0.7 * soft, hard, soft]))
    torch.testing.assert_close(found[1], F.cross_entropy(student, labels))


def test_refuses_what_the_two_losses_refuse():
    with pytest.raises(ValueError, match="student has 5 classes, the teacher 6"):
        hard_and_soft(logits(4, 5), logits(4, 6), labels_of("all", 4), temperature=1.0, **WEIGHTS)
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got 0"):
        hard_and_soft(logits(4, 5), logits(4, 5), labels_of("all", 4), temperature=0.0, **WEIGHTS)
