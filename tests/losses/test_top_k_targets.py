"""Terms that learn from a teacher's largest logits."""

import pytest
import torch
from torch import nn

from lightning_distill import Outputs, Step
from lightning_distill.losses import FusedKD, SoftTargets, SparseKD, TopKTargets, cross_entropy, reduce_items
from lightning_distill.top_k import encode_top_k

TEMPERATURES = (0.01, 1.0, 2.0, 1000.0)


def known(logits, k=4):
    return Outputs(top_k=encode_top_k(logits, k=k, temperatures=TEMPERATURES))


def step(student, teacher, **fields):
    return Step(None, student if isinstance(student, Outputs) else Outputs(student), teacher, **fields)


@pytest.mark.chapter("A70", api="lightning_distill.losses.TopKTargets")
@pytest.mark.erratum("ERR-27")
def test_the_golden_divergence_with_a_tail(golden):
    case = golden("topk_kd")
    student, teacher = case.inputs["p_student"].log(), case.inputs["p_teacher"].log()
    found = TopKTargets()(step(student[None], known(teacher[None], k=int(case.inputs["k"]))))
    assert found.shape == (1,)
    assert found.item() == pytest.approx(case.expected["tail_bucket_kl"], rel=2e-3)  # logits in float16
    renormalised = TopKTargets(add_tail=False)(step(student[None], known(teacher[None], k=int(case.inputs["k"]))))
    p = case.inputs["p_teacher"][:2] / case.inputs["p_teacher"][:2].sum()
    entropy = -(p * p.log()).sum().item()
    assert renormalised.item() + entropy == pytest.approx(case.expected["renormalised_teacher"], rel=2e-3)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_classes_give_the_divergence_of_soft_targets(beta, temperature):
    student, teacher = torch.randn(6, 9).requires_grad_(), torch.randn(6, 9)
    values = TopKTargets(beta=beta)(step(student, known(teacher, k=9), temperature=temperature))
    expected = SoftTargets(beta=beta)(step(student, Outputs(teacher), temperature=temperature))
    torch.testing.assert_close(values, expected, rtol=5e-3, atol=5e-3)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    (wanted,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=5e-3)


def hidden(vocabulary=50, tokens=12, width=8):
    head = nn.Linear(width, vocabulary)
    states = torch.randn(tokens, width, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[:3] = -100
    return states, head, labels


def gradients(term, states, head, teacher, *, project=False, **fields):
    student = Outputs(head(states)) if project else Outputs(hidden=states, head=head)
    value = reduce_items(term(step(student, teacher, **fields)), fields.get("mask"))
    return value, torch.autograd.grad(value, [states, head.weight, head.bias])


@pytest.mark.parametrize(
    "term", [TopKTargets(), TopKTargets(beta=0.5), TopKTargets(add_tail=False), SparseKD(), SparseKD(beta=1.0)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_from_hidden_states_as_from_logits(monkeypatch, term, masked):
    states, head, labels = hidden()
    mask = torch.arange(12) % 3 > 0 if masked else None
    fields = {"labels": labels, "mask": mask, "temperature": 2.0}
    teacher = known(torch.randn(12, 50))
    plain, plain_gradients = gradients(term, states, head, teacher, project=True, **fields)
    monkeypatch.setattr("lightning_distill.losses.fused.PLAIN_BYTES", 0)
    outputs = Outputs(hidden=states, head=head)
    fused, fused_gradients = gradients(term, states, head, teacher, **fields)
    torch.testing.assert_close(fused, plain)
    torch.testing.assert_close(fused_gradients, plain_gradients)
    term(step(outputs, teacher, **fields))
    assert not outputs.has_logits


def test_the_joint_term_is_the_sum_of_its_parts():
    states, head, labels = hidden()
    fields = {"labels": labels, "temperature": 2.0}
    teacher = known(torch.randn(12, 50))
    term = SparseKD(alpha=0.25)
    value, _ = gradients(term, states, head, teacher, **fields)
    soft, _ = gradients(TopKTargets(), states, head, teacher, **fields)
    hard = cross_entropy(head(states), labels).mean()
    torch.testing.assert_close(value, 0.25 * hard + 0.75 * soft)
    torch.testing.assert_close(term.parts["hard"], hard.detach())
    torch.testing.assert_close(term.parts["soft"], soft.detach())
    for student in (Outputs(hidden=states, head=head), Outputs(head(states))):
        torch.testing.assert_close(SparseKD(alpha=0.25)(step(student, teacher, temperature=2.0)), 0.75 * soft)


@pytest.mark.parametrize("fused", [False, True])
def test_a_padded_student_learns_the_true_vocabulary(monkeypatch, fused):
    if fused:
        monkeypatch.setattr("lightning_distill.losses.fused.PLAIN_BYTES", 0)
    states, head, labels = hidden(vocabulary=64)
    teacher = known(torch.randn(12, 50))
    cut = nn.Linear(8, 50)
    cut.weight.data, cut.bias.data = head.weight.data[:50], head.bias.data[:50]
    labels = labels.clamp_max(49)
    for term in (TopKTargets, SparseKD):
        value, _ = gradients(term(vocabulary=50), states, head, teacher, labels=labels)
        expected, _ = gradients(term(), states, cut, teacher, labels=labels)
        torch.testing.assert_close(value, expected)
        with pytest.raises(ValueError, match=r"student has 64 classes, the teacher's cache 50.*`vocabulary=`"):
            gradients(term(), states, head, teacher, labels=labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("classes", [1, 3])
def test_finite_at_the_ends(classes, temperature, dtype):
    big = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 9984.0], [1e4, 1e4, 1e4]])[:, :classes].to(dtype)
    for teacher in (big, big.roll(1, -1), torch.zeros_like(big)):
        student = big.clone().requires_grad_()
        values = TopKTargets()(step(student, known(teacher, k=1), temperature=temperature))
        assert values.dtype == torch.float32
        assert values.isfinite().all()
        values.sum().backward()
        if dtype != torch.float16:
            assert student.grad.isfinite().all()


def test_terms_that_need_all_logits_say_what_to_do():
    teacher = known(torch.randn(2, 6))
    for term in (SoftTargets(), FusedKD()):
        with pytest.raises(ValueError, match=r"all 6 classes.*holds the 4 largest.*`TopKTargets`.*`kind='dense'`"):
            term(step(torch.randn(2, 6), teacher))
    with pytest.raises(ValueError, match=r"but the teacher gives all of them\. Use `SoftTargets`"):
        TopKTargets()(step(torch.randn(2, 6), Outputs(torch.randn(2, 6))))


def test_a_temperature_that_is_not_stored_is_refused():
    teacher = known(torch.randn(2, 6))
    with pytest.raises(ValueError, match=r"stored at, 0\.01, 1, 2, 1000, got 3\.0"):
        TopKTargets()(step(torch.randn(2, 6), teacher, temperature=3.0))
    with pytest.raises(ValueError, match=r"one number.*got one per item, of shape \(2,\)"):
        TopKTargets()(step(torch.randn(2, 6), teacher, temperature=torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize("term", [TopKTargets, SparseKD])
def test_refuses_bad_arguments(term):
    with pytest.raises(ValueError, match=r"`beta` must be in \[0, 1\], got nan"):
        term(beta=float("nan"))
    with pytest.raises(ValueError, match=r"`beta=1` \(reverse KL\) is infinite without the tail"):
        term(beta=1.0, add_tail=False)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got -1"):
        SparseKD(alpha=-1)
    with pytest.raises(ValueError, match="but there is none"):
        term()(step(torch.randn(2, 6), None))


def test_items_of_a_known_top_are_counted_without_logits():
    outputs = known(torch.randn(2, 3, 6))
    assert outputs.item_shape == (2, 3)
    assert not outputs.has_logits
