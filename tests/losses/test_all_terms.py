"""What must hold for every term that compares logits with a teacher's."""

import math

import pytest
import torch

from lightning_distill.losses import (
    DIST,
    DKD,
    LogitStandardization,
    SoftTargets,
    TeacherSquaredError,
    reduce_items,
    soft_cross_entropy,
)
from lightning_distill.losses.term import Term
from lightning_distill.outputs import Outputs, Step


class SoftCrossEntropy(Term):
    def forward(self, step):
        return soft_cross_entropy(step.student.logits, step.teacher.logits, temperature=step.temperature)


PER_ITEM = {
    "forward": SoftTargets(),
    "reverse": SoftTargets(beta=1.0),
    "jensen_shannon": SoftTargets(beta=0.5),
    "mostly_forward": SoftTargets(beta=0.01),
    "skewed": SoftTargets(skew=0.1),
    "skewed_reverse": SoftTargets(beta=1.0, skew=0.1),
    "without_t2": SoftTargets(scale_by_t2=False),
    "dkd": DKD(),
    "inter_class": DIST(gamma=0.0),
    "standardized": LogitStandardization(),
    "standardized_dkd": LogitStandardization(DKD()),
}
DIVERGENCES = PER_ITEM | {"dist": DIST()}
TERMS = DIVERGENCES | {"soft_cross_entropy": SoftCrossEntropy(), "squared_error": TeacherSquaredError()}


def over(terms):
    return pytest.mark.parametrize("term", terms.values(), ids=terms.keys())


def logits(*shape, seed=0):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(*shape):
    return logits(*shape, seed=1), logits(*shape, seed=2)


def values_of(term, student, teacher, temperature=2.0, labels=None):
    items = student.shape[:-1]
    if labels is None:
        labels = torch.arange(math.prod(items)).reshape(items) % student.shape[-1]
    return term(Step(None, Outputs(student), Outputs(teacher), labels=labels, temperature=temperature))


@over(DIVERGENCES | {"squared_error": TeacherSquaredError()})
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_zero_at_equality_and_positive_elsewhere(term, temperature):
    student, teacher = pair(8, 5)
    assert values_of(term, teacher.clone(), teacher, temperature).abs().max() < 1e-9
    assert values_of(term, student, teacher, temperature).min() > 1e-6


@over(TERMS)
def test_only_the_student_gets_a_gradient(term):
    student, teacher = (side.requires_grad_() for side in pair(8, 5))
    reduce_items(values_of(term, student, teacher)).backward()
    assert (student.grad.abs().sum(-1) > 0).all()
    assert teacher.grad is None


@over(DIVERGENCES | {"soft_cross_entropy": SoftCrossEntropy()})
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_is_that_of_finite_differences(term, temperature):
    student, teacher = pair(3, 4)
    assert torch.autograd.gradcheck(lambda s: values_of(term, s, teacher, temperature), student.requires_grad_())


@over(TERMS)
@pytest.mark.chapter("A20")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
def test_finite_at_the_ends(term, temperature, dtype):
    big = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 9984.0], [1e4, 1e4, 1e4], [0.0, 0.0, 1.0]])
    for student, teacher in ((big, big.roll(1, -1)), (big, torch.zeros(4, 3)), (torch.zeros(4, 3), big), (big, big)):
        student = student.to(dtype).requires_grad_()
        values = values_of(term, student, teacher.to(dtype), temperature)
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        reduce_items(values).backward()
        if dtype != torch.float16:  # its gradients end at 65504, whatever the loss
            assert student.grad.isfinite().all()


@over(TERMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [1.0, 0.3])
def test_half_precision_inputs_are_computed_in_float32(term, dtype, distance):
    """Close to the teacher too, where bfloat16 arithmetic is off by tens of percent."""
    teacher = logits(8, 1000).to(dtype)
    student = (teacher + distance * logits(8, 1000, seed=1)).to(dtype)
    half, exact = values_of(term, student, teacher), values_of(term, student.double(), teacher.double())
    torch.testing.assert_close(half.double(), exact.double(), rtol=1e-4, atol=1e-6)


@over(TERMS)
def test_autocast_changes_nothing(term):
    student, teacher = (side.float() for side in pair(8, 5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = values_of(term, student, teacher)
    assert torch.equal(inside, values_of(term, student, teacher))


@over(DIVERGENCES | {"soft_cross_entropy": SoftCrossEntropy()})
def test_float64_stays_float64(term):
    assert values_of(term, *pair(8, 5)).dtype == torch.float64


@over(DIVERGENCES | {"soft_cross_entropy": SoftCrossEntropy()})
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_one_class_has_nothing_to_say(term, temperature):
    student, teacher = logits(4, 1, seed=1).requires_grad_(), logits(4, 1, seed=2)
    values = values_of(term, student, teacher, temperature)
    values.sum().backward()
    assert values.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12


@over(DIVERGENCES | {"soft_cross_entropy": SoftCrossEntropy()})
def test_shifting_the_logits_of_an_item_changes_nothing(term):
    student, teacher = pair(8, 5)
    shifted = values_of(term, student + logits(8, 1, seed=3), teacher + logits(8, 1, seed=4))
    torch.testing.assert_close(shifted, values_of(term, student, teacher), rtol=1e-8, atol=1e-10)


@over(PER_ITEM | {"soft_cross_entropy": SoftCrossEntropy()})
def test_one_temperature_per_item_is_each_item_at_its_own(term):
    student, teacher = pair(3, 5)
    temperatures = [0.5, 1.0, 7.0]
    at_once = values_of(term, student, teacher, torch.tensor(temperatures, dtype=torch.float64))
    one_by_one = [
        values_of(term, student[i : i + 1], teacher[i : i + 1], t, labels=torch.tensor([i]))
        for i, t in enumerate(temperatures)
    ]
    torch.testing.assert_close(at_once, torch.cat(one_by_one))


@over(PER_ITEM | {"soft_cross_entropy": SoftCrossEntropy(), "squared_error": TeacherSquaredError()})
def test_an_item_does_not_depend_on_its_batch(term):
    student, teacher = pair(8, 5)
    labels = torch.arange(8) % 5
    whole = values_of(term, student, teacher, labels=labels)
    parts = [values_of(term, student[s], teacher[s], labels=labels[s]) for s in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(whole, torch.cat(parts))


@over(TERMS)
def test_tokens_are_items(term):
    student, teacher = pair(2, 4, 5)
    tokens = values_of(term, student, teacher)
    flat = values_of(term, student.reshape(8, 5), teacher.reshape(8, 5))
    torch.testing.assert_close(tokens, flat.reshape(2, 4))


@over(DIVERGENCES | {"soft_cross_entropy": SoftCrossEntropy()})
def test_errors_name_both_sizes_and_the_fix(term):
    labels = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"student has 5 classes, the teacher 6; .*as many outputs as the teacher"):
        values_of(term, logits(4, 5), logits(4, 6), labels=labels)
    with pytest.raises(ValueError, match=r"items of shape \(4,\), the teacher's \(3,\); both must see the same batch"):
        values_of(term, logits(4, 5), logits(3, 5), labels=labels)


@over(DIVERGENCES | {"soft_cross_entropy": SoftCrossEntropy()})
@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_bad_temperature(term, temperature):
    with pytest.raises(ValueError, match=f"`temperature` must be positive and finite, got {temperature}"):
        values_of(term, *pair(4, 5), temperature)


@over(DIVERGENCES)
def test_says_what_to_do_without_a_teacher(term):
    with pytest.raises(ValueError, match="compares the student with a teacher, but there is none"):
        term(Step(None, Outputs(logits(4, 5)), labels=torch.zeros(4, dtype=torch.long)))


@over(DIVERGENCES)
def test_has_no_parameters_and_can_be_stored(term, tmp_path):
    assert list(term.parameters()) == []
    torch.save(term, tmp_path / "term.pt")
    loaded = torch.load(tmp_path / "term.pt", weights_only=False)
    assert torch.equal(values_of(loaded, *pair(4, 5)), values_of(term, *pair(4, 5)))
