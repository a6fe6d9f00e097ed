"""Divergence from the most probable classes of a teacher, against its definition in NumPy and against the full KL."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from lightning_distill.losses.soft_targets import jensen_shannon_divergence, kl_divergence
from lightning_distill.losses.top_k import coarse_log_probs, top_k_log_probs, topk_kl


def example(items=(6,), classes=40, k=8, temperature=1.0):
    student = torch.randn(*items, classes, dtype=torch.float64) * 2
    teacher = torch.randn(*items, classes, dtype=torch.float64) * 3
    log_p = torch.log_softmax(teacher / temperature, -1)
    log_probs, ids = log_p.topk(k, dim=-1)
    return student, teacher, ids, log_probs, torch.log1p(-log_probs.exp().sum(-1))


def definition(student, teacher, ids, temperature, tail=True):
    """Coarsen, then compare; in NumPy."""
    values = []
    for z_s, z_t, kept in zip(student.numpy(), teacher.numpy(), ids.numpy(), strict=True):
        q, p = softmax(z_s / temperature), softmax(z_t / temperature)
        if tail:
            coarse = [np.append(x[kept], np.delete(x, kept).sum()) for x in (p, q)]
            values.append(rel_entr(*coarse).sum())
        else:
            values.append(rel_entr(p[kept] / p[kept].sum(), q[kept]).sum())
    return torch.tensor(values) * temperature**2


@pytest.mark.chapter("A70")
@pytest.mark.erratum("ERR-27")
def test_golden(golden):
    case = golden("topk_kd")
    p, q, k = case.inputs["p_teacher"], case.inputs["p_student"], case.inputs["k"]
    close = {"rtol": case.rtol, "atol": case.atol}
    ids, log_probs, tail = torch.arange(k), p[:k].log(), p[k:].sum().log()
    with_tail = topk_kl(q.log(), ids, log_probs, tail)
    torch.testing.assert_close(with_tail.item(), case.expected["tail_bucket_kl"], **close)
    assert with_tail < case.expected["full_kl"]

    renormalised = p[:k] / p[:k].sum()
    cross_entropy = topk_kl(q.log(), ids, log_probs, None) - (renormalised * renormalised.log()).sum()
    torch.testing.assert_close(cross_entropy.item(), case.expected["renormalised_teacher"], **close)


@pytest.mark.chapter("A70")
@pytest.mark.erratum("ERR-27")
def test_without_the_tail_the_best_student_gives_nothing_to_the_other_classes(golden):
    """The chapter's sum over the kept classes and its renormalised form have the same, over-confident minimum."""
    case = golden("topk_kd")
    p, k = case.inputs["p_teacher"], case.inputs["k"]
    minimiser = case.expected["literal_minimiser"]
    assert topk_kl(minimiser.log().clamp_min(-1e4), torch.arange(k), p[:k].log(), None).abs() < 1e-9
    with_tail = topk_kl(minimiser.log().clamp_min(-1e4), torch.arange(k), p[:k].log(), p[k:].sum().log())
    assert with_tail > 1000  # the tail bucket refuses what the renormalised form calls perfect
    assert topk_kl(p.log(), torch.arange(k), p[:k].log(), p[k:].sum().log()).abs() < 1e-9


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("with_tail", [True, False], ids=["tail", "renormalised"])
def test_matches_definition(temperature, with_tail):
    student, teacher, ids, log_probs, tail = example(temperature=temperature)
    value = topk_kl(student, ids, log_probs, tail if with_tail else None, temperature=temperature)
    torch.testing.assert_close(value, definition(student, teacher, ids, temperature, with_tail))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_is_the_full_divergence_when_all_classes_are_kept(beta):
    student, teacher, ids, log_probs, _ = example(k=40)
    full = jensen_shannon_divergence(student, teacher, beta=beta, temperature=1.0)
    no_tail = torch.full((6,), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(topk_kl(student, ids, log_probs, no_tail, beta=beta), full)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_grows_with_k_up_to_the_full_divergence(beta):
    """Data processing inequality: merging outcomes cannot tell two distributions further apart."""
    student, teacher, *_ = example()
    values = []
    for k in (1, 4, 16, 32):
        log_probs, ids = torch.log_softmax(teacher, -1).topk(k, dim=-1)
        values.append(topk_kl(student, ids, log_probs, torch.log1p(-log_probs.exp().sum(-1)), beta=beta))
    values.append(jensen_shannon_divergence(student, teacher, beta=beta))
    assert (torch.stack(values).diff(dim=0) >= -1e-9).all()


def test_tail_bucket_has_the_better_gradient():
    """Of a peaked teacher, the gradient with the tail is far closer to the full one than the renormalised."""
    teacher = -1.5 * torch.arange(1, 501, dtype=torch.float64).log() + torch.randn(50, 500, dtype=torch.float64) / 2
    student = (teacher + torch.randn(50, 500, dtype=torch.float64) / 2).requires_grad_()
    log_probs, ids = torch.log_softmax(teacher, -1).topk(32, dim=-1)
    tail = torch.log1p(-log_probs.exp().sum(-1))
    full, bucket, renormalised = (
        torch.autograd.grad(value.sum(), student)[0]
        for value in (
            kl_divergence(student, teacher),
            topk_kl(student, ids, log_probs, tail),
            topk_kl(student, ids, log_probs, None),
        )
    )
    assert 4 * (bucket - full).norm() < (renormalised - full).norm()


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_at_extremes(temperature, dtype):
    student = torch.tensor([[1e4, -1e4, 0.0, 5.0], [0.0, 0.0, 0.0, 0.0]]).to(dtype).requires_grad_()
    log_probs = torch.tensor([[-20.0, -0.1], [-math.inf, 0.0]])
    tail = torch.tensor([-2.4, -math.inf])
    value = topk_kl(student, torch.tensor([[1, 2], [0, 3]]), log_probs, tail, temperature=temperature)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert student.grad.isfinite().all()


def test_temperature_may_differ_between_items():
    student, _, ids, log_probs, tail = example()
    temperatures = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    values = topk_kl(student, ids, log_probs, tail, temperature=temperatures)
    singly = [topk_kl(student[i], ids[i], log_probs[i], tail[i], temperature=temperatures[i].item()) for i in range(6)]
    torch.testing.assert_close(values, torch.stack(singly))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_log_probs_and_tail_from_a_stored_normaliser(temperature):
    logits = torch.randn(5, 30, dtype=torch.float64) * 3
    relative = logits - logits.amax(-1, keepdim=True)
    kept, ids = relative.topk(6, dim=-1)
    normaliser = torch.logsumexp(relative / temperature, -1)
    log_probs, tail = top_k_log_probs(kept, normaliser, temperature=temperature)
    expected = log_softmax(logits.numpy() / temperature, axis=-1)
    torch.testing.assert_close(log_probs.numpy(), np.take_along_axis(expected, ids.numpy(), -1))
    others = np.exp(expected)
    np.put_along_axis(others, ids.numpy(), 0, -1)
    torch.testing.assert_close(tail.exp().numpy(), others.sum(-1))


def test_tail_is_empty_rather_than_nan_when_rounding_leaves_too_much():
    _, tail = top_k_log_probs(torch.tensor([[0.0, -1.0]]), torch.tensor([0.31]))
    assert tail.item() == -math.inf


def test_teacher_is_normalised_exactly():
    """What comes out of a cache in half precision does not sum to 1; at equality the loss must still be 0."""
    coarse = coarse_log_probs(
        torch.Size([1]), torch.tensor([[0, 1]]), torch.tensor([[-0.7, -1.2]]), torch.tensor([-1.5])
    )
    torch.testing.assert_close(coarse.exp().sum(-1), torch.ones(1))


def test_teacher_receives_no_gradient():
    student, _, ids, log_probs, tail = example()
    student.requires_grad_()
    log_probs.requires_grad_()
    topk_kl(student, ids, log_probs, tail).sum().backward()
    assert student.grad.abs().sum() > 0
    assert log_probs.grad is None


def test_errors():
    student, _, ids, log_probs, tail = example()
    with pytest.raises(ValueError, match=r"`ids` and `log_probs` must have the shape .* got \(6, 8\) and \(6, 7\)"):
        topk_kl(student, ids, log_probs[:, 1:], tail)
    with pytest.raises(ValueError, match=r"`ids` must be integers, got torch\.float64"):
        topk_kl(student, log_probs, log_probs, tail)
    with pytest.raises(ValueError, match=r"`tail_log_prob` must have the shape of the items, \(6,\), got \(6, 1\)"):
        topk_kl(student, ids, log_probs, tail[:, None])
    with pytest.raises(ValueError, match=r"`beta=1` .* is infinite without `tail_log_prob`"):
        topk_kl(student, ids, log_probs, None, beta=1.0)
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got nan"):
        topk_kl(student, ids, log_probs, tail, temperature=math.nan)
    with pytest.raises(ValueError, match="`temperature` must be positive, got 0"):
        top_k_log_probs(log_probs, tail, temperature=0.0)
    with pytest.raises(ValueError, match=r"`logsumexp` must have the shape of the items, \(6,\), got \(6, 8\)"):
        top_k_log_probs(log_probs, log_probs)
