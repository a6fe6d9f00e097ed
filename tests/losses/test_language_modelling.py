"""Sampled targets, token-level distillation and weights of tokens."""

import math
import pickle

import pytest
import torch
from torch import nn

from lightning_distill.losses import CrossEntropy, SoftTargets, kl_divergence, reduce_items, soft_cross_entropy
from lightning_distill.losses.language_modelling import (
    AdaptiveTokenWeight,
    EntropyTokenWeight,
    SampledTargets,
    adaptive_beta,
    effective_share,
    sampled_kd,
)
from lightning_distill.modules import DistillationModule
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import CausalLM


def logits(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator():
    return torch.Generator().manual_seed(0)


# Token-level distillation


@pytest.mark.chapter("A69", api="lightning_distill.losses.soft_cross_entropy")
@pytest.mark.erratum("ERR-26")
def test_token_level_distillation_matches_golden(golden):
    case = golden("token_level_kd")
    close = {"rtol": case.rtol, "atol": case.atol}
    teacher, student = case.inputs["p_teacher"].log(), case.inputs["student_logprobs"]
    values, mask = soft_cross_entropy(student, teacher), case.inputs["mask"].bool()
    torch.testing.assert_close(values.sum().item(), case.expected["sum"], **close)
    torch.testing.assert_close(reduce_items(values, mask).item(), case.expected["masked_mean"], **close)
    torch.testing.assert_close(kl_divergence(student, teacher).sum().item(), case.expected["kl_sum"], **close)
    entropy = soft_cross_entropy(teacher, teacher).sum().item()
    torch.testing.assert_close(entropy, case.expected["teacher_entropy_sum"], **close)


class Says(nn.Module):
    """A language model that says the same whatever it reads; its logits are its parameter."""

    def __init__(self, logits):
        super().__init__()
        last = torch.zeros_like(logits[:1])  # what it says after the last token is compared with nothing
        self.logits = nn.Parameter(torch.cat([logits, last])[None])

    def forward(self, input_ids):
        return self.logits.expand(len(input_ids), -1, -1)


@pytest.mark.chapter("A77", api="lightning_distill.losses.SoftTargets")
@pytest.mark.erratum("ERR-31")
def test_causal_lm_loss_is_the_golden_one(golden):
    case = golden("clm_kd_loss")
    close = {"rtol": case.rtol, "atol": case.atol}
    student, teacher = case.inputs["student_logprobs"], case.inputs["p_teacher"].log()
    tokens = case.inputs["tokens"].long()
    module = DistillationModule(
        Says(student),
        Says(teacher),
        terms={"hard": CrossEntropy(), "soft": SoftTargets(beta=1.0)},
        weights={"hard": 1.0, "soft": case.inputs["beta"]},
        task=CausalLM(),
    )
    step = module.observe({"input_ids": torch.cat([torch.tensor([3]), tokens])[None]})
    torch.testing.assert_close(module.terms["hard"](step), case.expected["nll"], **close)
    torch.testing.assert_close(module.terms["soft"](step), case.expected["reverse_kl"], **close)
    torch.testing.assert_close(SoftTargets()(step), case.expected["forward_kl"], **close)
    total = module.weighting(module.losses(step))
    torch.testing.assert_close(3 * total.item(), case.expected["total_sum"], **close)


@pytest.mark.chapter("A77")
@pytest.mark.erratum("ERR-31")
def test_a_divergence_inside_the_negated_sum_would_be_maximised(golden):
    """Read as printed, a step downhill takes the student away from its teacher; ours takes it closer."""
    inputs = golden("clm_kd_loss").inputs
    teacher = inputs["p_teacher"].log()

    def after_a_step(sign):
        student = inputs["student_logprobs"].clone().requires_grad_()
        (sign * kl_divergence(student, teacher, direction="reverse").sum()).backward()
        return kl_divergence(student.detach() - 0.1 * student.grad, teacher, direction="reverse").sum().item()

    now = kl_divergence(inputs["student_logprobs"], teacher, direction="reverse").sum().item()
    assert after_a_step(+1) < now - 0.01
    assert after_a_step(-1) > now + 0.01


# Sampled targets


@pytest.mark.chapter("A71", api="lightning_distill.losses.sampled_kd")
@pytest.mark.erratum("ERR-28")
def test_importance_sampling_needs_draws_from_the_proposal(golden):
    case = golden("importance_sampling_ce")
    p, q, r = case.inputs["p_teacher"], case.inputs["p_student"], case.inputs["proposal"]
    as_written = (p * (p / r) * -q.log()).sum().item()  # drawn from the teacher, and still divided by the proposal
    torch.testing.assert_close(as_written, case.expected["as_written_expectation"], rtol=1e-9, atol=0)
    share = effective_share(p.log(), r.log()).item()
    torch.testing.assert_close(share, case.expected["ess_fraction"], rtol=case.rtol, atol=case.atol)
    result = sampled_kd(q.log(), p.log(), proposal=r.log(), num_samples=200_000, generator=generator())
    weights = p / r
    deviation = math.sqrt((r * (weights * q.log()).square()).sum() - case.expected["target"] ** 2) / math.sqrt(200_000)
    assert abs(result.values.item() - case.expected["corrected_expectation"]) < 4 * deviation
    torch.testing.assert_close(result.effective_samples.item(), 200_000 * share)


@pytest.mark.chapter("A71")
@pytest.mark.parametrize("proposal", ["teacher", "student", "uniform", "tensor"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_value_and_gradient_are_unbiased(proposal, temperature):
    repeats, samples = 4000, 8
    student, teacher = logits(1, 5, seed=1).requires_grad_(), logits(1, 5, seed=2)
    expected = soft_cross_entropy(student, teacher, temperature=temperature)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    many = student.detach().expand(repeats, 5).clone().requires_grad_()
    log_p = (teacher / temperature).log_softmax(-1).expand(repeats, 5)
    source = torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]).log() if proposal == "tensor" else proposal
    result = sampled_kd(
        many, log_p, proposal=source, num_samples=samples, temperature=temperature, generator=generator()
    )
    result.values.sum().backward()
    for found, exact in ((result.values.detach()[:, None], expected.detach()), (many.grad, gradient)):
        error = found.mean(dim=0) - exact.squeeze(0)
        assert (error.abs() < 4.5 * found.std(dim=0) / math.sqrt(repeats)).all()


def test_samples_of_the_teacher_weigh_one():
    """Then the estimate is a mean of the student's surprises, and no sample is worth less than one."""
    student, teacher = logits(6, 9, seed=1), logits(6, 9, seed=2).log_softmax(-1)
    result = sampled_kd(student, teacher, num_samples=1, generator=generator())
    surprises = -student.log_softmax(-1)
    assert ((result.values[:, None] - surprises).abs().amin(dim=-1) < 1e-12).all()
    torch.testing.assert_close(result.effective_samples, torch.ones(6, dtype=torch.float64))


def test_effective_share_is_zero_where_the_proposal_cannot_reach_and_finite_elsewhere():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    r = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    torch.testing.assert_close(effective_share(p.log(), r.log()), torch.tensor([0.0, 0.5]))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shapes_and_extremes(shape, dtype):
    student = (1e4 * torch.sign(logits(*shape, 6, seed=1))).to(dtype).requires_grad_()
    teacher = (5000 * logits(*shape, 6, seed=2)).log_softmax(-1)
    result = sampled_kd(student, teacher, num_samples=3)
    result.values.sum().backward()
    assert result.values.shape == result.effective_samples.shape == shape
    assert result.values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.values.isfinite().all()
    assert student.grad.isfinite().all()


def test_term_estimates_the_soft_cross_entropy_at_the_temperature_of_the_step():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2)
    step = Step(None, Outputs(student), Outputs(teacher), temperature=2.0)
    term = SampledTargets(num_samples=100_000, proposal="uniform")
    torch.testing.assert_close(term(step), soft_cross_entropy(student, teacher, temperature=2.0), rtol=0.03, atol=0)
    share = effective_share((teacher / 2).log_softmax(-1), torch.full((5,), -math.log(5))).mean()
    torch.testing.assert_close(term.parts["effective_samples"], 100_000 * share)
    assert torch.equal(SampledTargets(4, scale_by_t2=False)(step).isfinite(), torch.ones(3, dtype=torch.bool))


def test_the_generator_decides_the_draw():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2).log_softmax(-1)
    first, second = (sampled_kd(student, teacher, num_samples=4, generator=generator()).values for _ in range(2))
    assert torch.equal(first, second)
    other = sampled_kd(student, teacher, num_samples=4, generator=torch.Generator().manual_seed(1)).values
    assert not torch.equal(first, other)


def test_errors_of_sampling():
    student, teacher = logits(3, 5, seed=1), logits(3, 5, seed=2).log_softmax(-1)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        sampled_kd(student, teacher, num_samples=0)
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got nan"):
        SampledTargets(num_samples=math.nan)
    with pytest.raises(ValueError, match=r"`proposal` must be 'teacher', 'student', 'uniform' or .*, got 'model'"):
        SampledTargets(proposal="model")
    with pytest.raises(
        ValueError, match=r"`proposal` must have the shape .* \(3, 5\), or of one item's, \(5,\), got \(3,\)"
    ):
        sampled_kd(student, teacher, proposal=torch.zeros(3))
    with pytest.raises(ValueError, match="The student has 5 classes, the teacher 4"):
        sampled_kd(student, teacher[:, :4])
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got 0"):
        sampled_kd(student, teacher, temperature=0.0)


# Trust in the teacher, token by token


@pytest.mark.chapter("A78", api="lightning_distill.losses.AdaptiveTokenWeight")
@pytest.mark.erratum("ERR-32")
def test_adaptive_beta_matches_golden_and_the_printed_one_turns_the_other_way(golden):
    case, printed = golden("adaptive_beta"), golden("adaptive_beta_as_written")
    p, beta0 = case.inputs["p_teacher_of_token"], case.inputs["beta0"]
    ours = adaptive_beta(p.log(), beta0=beta0)
    torch.testing.assert_close(ours, case.expected["beta"], rtol=case.rtol, atol=case.atol)
    assert (ours.diff() > 0).all()  # a sure teacher counts for more, as the text of the chapter asks
    as_written = beta0 * torch.exp(-p)
    torch.testing.assert_close(as_written, printed.expected["beta"], rtol=printed.rtol, atol=printed.atol)
    assert (as_written.diff() < 0).all()


def language_step(in_chunks=False, labels=None):
    hidden, head = logits(6, 4, seed=3), nn.Linear(4, 7, bias=False, dtype=torch.float64)
    teacher = Outputs(hidden=hidden, head=head) if in_chunks else Outputs(head(hidden).detach())
    return Step(None, Outputs(logits(6, 7, seed=4)), teacher, labels=labels), head(hidden).detach()


@pytest.mark.chapter("A78")
@pytest.mark.parametrize("in_chunks", [True, False])
def test_weights_of_tokens(in_chunks, monkeypatch):
    labels = torch.tensor([0, 1, 2, -100, 6, 5])
    step, teacher = language_step(in_chunks, labels)
    if in_chunks:  # two items at a time
        chunks = step.teacher.chunks
        monkeypatch.setattr(step.teacher, "chunks", lambda: chunks(elements=14))
    p = teacher.softmax(-1)
    expected = torch.stack([p[i, label] if label >= 0 else torch.ones(()).double() for i, label in enumerate(labels)])
    weights = AdaptiveTokenWeight(0.5)(step)
    torch.testing.assert_close(weights, 0.5 * expected)
    assert not weights.requires_grad
    entropy = EntropyTokenWeight(2.0)(step)
    torch.testing.assert_close(entropy, 2 * (p * p.log()).sum(-1).exp())
    assert step.teacher.has_logits != in_chunks  # a large vocabulary is not laid out for the weights' sake


def test_weights_at_the_ends():
    sure, unsure = torch.tensor([[1e4, 0.0, 0.0]]), torch.zeros(1, 3)
    student = Outputs(torch.zeros(2, 3))
    step = Step(None, student, Outputs(torch.cat([sure, unsure])), labels=torch.tensor([1, 1]))
    torch.testing.assert_close(AdaptiveTokenWeight()(step), torch.tensor([0.0, 1 / 3]))
    torch.testing.assert_close(EntropyTokenWeight()(step), torch.tensor([1.0, 1 / 3]))
    without_labels = Step(None, student, step.teacher)
    assert AdaptiveTokenWeight(0.7)(without_labels).item() == pytest.approx(0.7)


def test_weights_multiply_the_soft_term_alone():
    labels = torch.tensor([0, 1, 2, 3, 6, 5])
    step, _ = language_step(labels=labels)
    weight = AdaptiveTokenWeight(0.5)
    module = DistillationModule(
        nn.Linear(1, 1),
        nn.Linear(1, 1),
        terms={"hard": CrossEntropy(), "soft": SoftTargets()},
        item_weights={"soft": weight},
    )
    losses = module.losses(step)
    torch.testing.assert_close(losses["hard"], CrossEntropy()(step).mean())
    torch.testing.assert_close(losses["soft"], (SoftTargets()(step) * weight(step)).mean())
    assert pickle.loads(pickle.dumps(weight)).beta0 == 0.5


@pytest.mark.parametrize("beta0", [-0.1, math.nan, math.inf])
@pytest.mark.parametrize(
    "make", [AdaptiveTokenWeight, EntropyTokenWeight, lambda b: adaptive_beta(torch.zeros(1), beta0=b)]
)
def test_refuses_a_bad_beta0(make, beta0):
    with pytest.raises(ValueError, match=f"`beta0` must be at least 0 and finite, got {beta0}"):
        make(beta0)


def test_weights_need_a_teacher():
    step = Step(None, Outputs(torch.zeros(1, 3)), labels=torch.tensor([0]))
    for weight in (AdaptiveTokenWeight(), EntropyTokenWeight()):
        with pytest.raises(ValueError, match="compares the student with a teacher, but there is none"):
            weight(step)
