"""The largest logits and the mass of the others, as they are stored."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp

from lightning_distill.teachers.cache import CacheReader, CacheSpec, ShardWriter
from lightning_distill.top_k import decode_top_k, encode_top_k, temperature_index
from tests.teachers.cache.samples import assert_same

TEMPERATURES = (0.05, 1.0, 2.0, 4.0, 1000.0)


def tail_bucket_kl(student_logits, ids, log_p, tail_log_p, temperature):
    """KL between the distributions over the kept classes and "another class", in float64."""
    log_q = (student_logits / temperature).log_softmax(-1)
    dropped = log_q.scatter(-1, ids, -math.inf).logsumexp(-1)
    tail = tail_log_p.exp() * (tail_log_p - dropped)
    return temperature**2 * ((log_p.exp() * (log_p - log_q.gather(-1, ids))).sum(-1) + tail)


@pytest.mark.chapter("A70")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kept_classes_and_tail_are_those_of_the_softmax(temperature, dtype):
    logits = (4 * torch.randn(3, 7, 200)).to(dtype)
    found = decode_top_k(encode_top_k(logits, k=8, temperatures=TEMPERATURES), temperature=temperature)
    exact = log_softmax(logits.double().numpy() / temperature, axis=-1)
    order = np.argsort(-exact, axis=-1, kind="stable")
    kept = np.take_along_axis(exact, order[..., :8], axis=-1)
    tail = logsumexp(np.take_along_axis(exact, order[..., 8:], axis=-1), axis=-1)
    # Deltas below 16 in float16 are off by 2^-8 at most.
    np.testing.assert_allclose(found.log_probs, kept, atol=2**-7 / temperature)
    np.testing.assert_allclose(np.take_along_axis(exact, found.ids.numpy(), axis=-1), kept, rtol=1e-12)
    np.testing.assert_allclose(found.tail_log_prob, np.maximum(tail, -87.33), atol=max(2**-7 / temperature, 1e-5))
    np.testing.assert_allclose(
        found.log_probs.double().exp().sum(-1) + found.tail_log_prob.double().exp(), 1, rtol=1e-5
    )


def test_a_tail_far_below_the_rounding_of_the_kept_classes_is_still_exact():
    logits = torch.tensor([[0.0, -1.2345, *[-40.0] * 98]])  # the tail has 3e-16 of the mass
    found = decode_top_k(encode_top_k(logits, k=2, temperatures=[1.0]), temperature=1.0)
    exact = log_softmax(logits.double().numpy(), axis=-1)[0]
    assert found.tail_log_prob.item() == pytest.approx(logsumexp(exact[2:]), abs=1e-3)


@pytest.mark.chapter("A70")
@pytest.mark.erratum("ERR-27")
def test_tail_bucket_keeps_what_truncation_and_renormalising_lose():
    p, q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]), torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1]).double()
    found = decode_top_k(encode_top_k(p.log(), k=2, temperatures=[1.0]), temperature=1.0)
    kl = tail_bucket_kl(q.log(), found.ids, found.log_probs.double(), found.tail_log_prob.double(), 1.0)
    assert kl.item() == pytest.approx(0.08801516852582822, rel=2e-3)  # float16 deltas
    assert kl.item() < 0.09651012036559808  # the full KL: merging classes can only lose divergence
    everything = decode_top_k(encode_top_k(p.log(), k=5, temperatures=[1.0]), temperature=1.0)
    full = (everything.log_probs.exp() * (everything.log_probs - q.log()[everything.ids])).sum()
    assert full.item() == pytest.approx(0.09651012036559808, rel=2e-3)


def discounted(parent, concentration, draws):
    """An n-gram model with absolute discounting, of a sample around ``parent``: one row per context."""
    drawn = torch.distributions.Dirichlet((concentration * parent).clamp_min(1e-12)).sample()
    counts = torch.distributions.Multinomial(draws, probs=drawn).sample()
    return ((counts - 0.6).clamp_min(0) + 0.6 * (counts > 0).sum(-1, keepdim=True) * parent) / draws


@pytest.mark.chapter("A70")
@pytest.mark.parametrize(("temperature", "bound"), [(1.0, 0.01), (2.0, 0.02)])
def test_gradient_from_64_classes_is_close_to_that_of_all_32768(temperature, bound):
    """On interpolated n-grams over a Zipf vocabulary: the teacher sees the context, the student a shorter one."""
    words = torch.arange(1, 32769, dtype=torch.float64) ** -1.0
    short = discounted((words / words.sum()).expand(8, -1), 20, 1000)
    teacher = discounted(short.repeat_interleave(4, 0), 3, 20)
    student = (0.9 * short + 0.1 * words / words.sum()).repeat_interleave(4, 0).log().requires_grad_()
    log_p = (teacher.log() / temperature).log_softmax(-1)
    full = temperature**2 * (log_p.exp() * (log_p - (student / temperature).log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(full, student)

    def error(ids, log_probs, tail_log_prob):
        loss = tail_bucket_kl(student, ids, log_probs.double(), tail_log_prob.double(), temperature).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        return ((gradient - expected).norm() / expected.norm()).item(), gradient

    found = decode_top_k(encode_top_k(teacher.log(), temperatures=[1.0, 2.0]), temperature=temperature)
    bucket, stored = error(*found)
    assert bucket <= bound
    renormalised, _ = error(found.ids, found.log_probs.log_softmax(-1), torch.full((32,), -700.0))
    assert renormalised > 10 * bucket
    # What storing adds to the choice of a tail bucket, whatever the distribution: the rounding of the deltas.
    top = log_p.topk(64)
    tail = log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    _, exact = error(top.indices, top.values, tail)
    assert (stored - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("classes", [1, 2, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_finite_at_the_extremes(dtype, classes):
    logits = torch.linspace(-1e4, 1e4, classes).to(dtype).repeat(2, 1)
    top_k = encode_top_k(logits, k=min(2, classes), temperatures=(0.01, 1.0, 1000.0))
    for temperature in top_k.temperatures:
        found = decode_top_k(top_k, temperature=temperature)
        assert torch.isfinite(found.log_probs).all()
        assert torch.isfinite(found.tail_log_prob).all()
        torch.testing.assert_close(found.log_probs.exp().sum(-1) + found.tail_log_prob.exp(), torch.ones(2))


def test_classes_ruled_out_have_no_mass():
    found = decode_top_k(encode_top_k(torch.tensor([0.0, -math.inf, 0.0, -math.inf]), k=3), temperature=2.0)
    assert set(found.ids[:2].tolist()) == {0, 2}
    torch.testing.assert_close(found.log_probs[:2].exp(), torch.tensor([0.5, 0.5]))
    assert found.log_probs[2].exp() == 0
    assert torch.isfinite(found.log_probs).all()  # so that p * log(p) is 0 and no NaN
    assert found.tail_log_prob.exp() < 1e-37


def test_large_batches_are_encoded_in_parts(monkeypatch):
    logits = torch.randn(3, 10, 40)
    whole = encode_top_k(logits, k=5)
    monkeypatch.setattr("lightning_distill.top_k._CHUNK", {"cpu": 160})
    assert_same(encode_top_k(logits, k=5), whole)
    assert encode_top_k(logits[:0], k=5).ids.shape == (0, 10, 5)


@pytest.mark.parametrize(("classes", "dtype"), [(65536, torch.uint16), (65537, torch.int32)], ids=str)
def test_ids_take_two_bytes_up_to_65536_classes(tmp_path, classes, dtype):
    logits = torch.zeros(1, classes)
    logits[0, [-1, 40000, 3]] = torch.tensor([3.0, 2.0, 1.0])
    with ShardWriter(tmp_path, CacheSpec("top_k", width=classes, k=3)) as writer:
        writer.write(torch.tensor([0]), logits)
    read = CacheReader(tmp_path).read([0])
    assert read.ids.dtype == dtype
    assert decode_top_k(read, temperature=1.0).ids.tolist() == [[classes - 1, 40000, 3]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rejects_a_teacher_that_says_nothing(bad):
    with pytest.raises(ValueError, match="`logits` must be finite"):
        encode_top_k(torch.tensor([[0.0, 1.0], [bad, 0.0]]), k=1)
    with pytest.raises(ValueError, match="`logits` must be finite"):
        encode_top_k(torch.full((1, 3), -math.inf), k=1)


@pytest.mark.parametrize("k", [0, 6])
def test_rejects_k_outside_the_classes(k):
    with pytest.raises(ValueError, match=rf"`k` must be in \[1, 5\], the number of classes, got {k}"):
        encode_top_k(torch.zeros(1, 5), k=k)


@pytest.mark.parametrize("temperatures", [[], [0.0], [1.0, math.nan], [math.inf]], ids=str)
def test_rejects_impossible_temperatures(temperatures):
    with pytest.raises(ValueError, match="`temperatures` must be positive, and one at least, got"):
        encode_top_k(torch.zeros(1, 5), k=1, temperatures=temperatures)


def test_refuses_a_temperature_that_was_not_stored():
    top_k = encode_top_k(torch.zeros(1, 5), k=1)
    with pytest.raises(ValueError, match=r"must be one that the teacher's tail was stored at, 1, 2, 4, got 3\.0"):
        decode_top_k(top_k, temperature=3.0)
    with pytest.raises(ValueError, match="got nan"):
        decode_top_k(top_k, temperature=math.nan)
    assert temperature_index((1.0, 0.1), 0.1 + 1e-12) == 1
