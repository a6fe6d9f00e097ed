"""Big-vocabulary losses against the plain losses under autograd in float64, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from lightning_distill.losses import fused
from lightning_distill.losses.big_vocabulary import (
    fused_linear_cross_entropy,
    fused_linear_kd,
    fused_linear_kd_items,
    sparse_kd,
    sparse_kd_items,
)
from lightning_distill.losses.fused import FusedCrossEntropy, FusedKD
from lightning_distill.losses.linear_kd import default_chunk_size
from lightning_distill.losses.soft_targets import jensen_shannon_divergence, kl_divergence, skewed_kl_divergence
from lightning_distill.losses.targets import cross_entropy
from lightning_distill.losses.term import reduce_items
from lightning_distill.losses.top_k import topk_kl
from lightning_distill.outputs import Outputs, Step

N, V, D, D_TEACHER, K = 23, 101, 16, 24, 7


@pytest.fixture
def tensors():
    """Student (hidden, weight, bias), teacher (hidden, weight), labels and mask, in float64."""
    random = {"dtype": torch.float64}
    student = [torch.randn(N, D, **random), torch.randn(V, D, **random) / 2, torch.randn(V, **random)]
    labels = torch.randint(V, (N,))
    labels[::4] = -100
    return (
        [x.requires_grad_() for x in student],
        (torch.randn(N, D_TEACHER, **random), torch.randn(V, D_TEACHER, **random) / 2),
        labels,
        torch.rand(N) > 0.3,
    )


def top_k(teacher, temperature=1.0):
    log_probs, ids = torch.log_softmax(teacher[0] @ teacher[1].T / temperature, -1).topk(K, dim=-1)
    return ids, log_probs, torch.log1p(-log_probs.exp().sum(-1))


def logits(student, teacher):
    return F.linear(*student), F.linear(*teacher)


def gradients(loss, student):
    return torch.autograd.grad(loss, student)


@pytest.mark.parametrize("chunk_size", [1, 8, 1000])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.chapter("A01", "A03")
def test_equals_the_plain_loss(tensors, temperature, beta, alpha, chunk_size):
    student, teacher, labels, mask = tensors
    weights = torch.rand(N, dtype=torch.float64).where(torch.rand(N) > 0.2, 0)
    z_s, z_t = logits(student, teacher)
    hard = (cross_entropy(z_s, labels) * weights)[mask].sum() / mask.sum()
    soft = jensen_shannon_divergence(z_s, z_t, beta=beta, temperature=temperature)
    soft = (soft * weights)[mask].sum() / mask.sum()
    expected = alpha * hard + (1 - alpha) * soft

    options = {"temperature": temperature, "beta": beta, "student_bias": student[2], "mask": mask}
    options["chunk_size"] = chunk_size
    result = fused_linear_kd(*student[:2], *teacher, labels, alpha=alpha, weights=weights, **options)
    torch.testing.assert_close(result, (expected, hard, soft))
    torch.testing.assert_close(gradients(result.loss * 3, student), gradients(expected * 3, student))
    assert not result.hard.requires_grad
    assert not result.soft.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 8, 1000])
def test_labels_alone_equal_the_plain_cross_entropy(tensors, chunk_size):
    student, _, labels, mask = tensors
    weights = torch.rand(N, dtype=torch.float64).where(torch.rand(N) > 0.2, 0)
    z = F.linear(*student)[:, : V - 3]
    expected = (cross_entropy(z, labels.clamp_max(V - 4)) * weights)[mask].sum() / mask.sum()
    options = {"bias": student[2], "mask": mask, "weights": weights, "vocabulary": V - 3, "chunk_size": chunk_size}
    value = fused_linear_cross_entropy(*student[:2], labels.clamp_max(V - 4), **options)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(value * 3, student), gradients(expected * 3, student))


@pytest.mark.parametrize("fuse", [True, False])
def test_the_term_on_labels_takes_either_way(tensors, fuse, monkeypatch):
    student, _, labels, mask = tensors
    monkeypatch.setattr(fused, "PLAIN_BYTES", 0 if fuse else math.inf)
    head = torch.nn.Linear(D, V, dtype=torch.float64)
    said = Outputs(hidden=student[0], head=head)
    value = FusedCrossEntropy()(Step({}, said, None, labels, mask))
    assert said.has_logits is not fuse
    torch.testing.assert_close(value, reduce_items(cross_entropy(head(student[0]), labels), mask))
    with pytest.raises(ValueError, match="learns from labels alone, but the batch has none"):
        FusedCrossEntropy()(Step({}, said, None, None, mask))


@pytest.mark.parametrize("skew", [0.1, 0.9])
@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_skewed_divergences_equal_the_plain_ones(tensors, temperature, beta, skew):
    student, teacher, labels, mask = tensors
    z_s, z_t = logits(student, teacher)
    direction = "reverse" if beta else "forward"
    soft = skewed_kl_divergence(z_s, z_t, skew=skew, direction=direction, temperature=temperature).where(mask, 0)
    hard = cross_entropy(z_s, labels).where(mask, 0)
    expected = (0.3 * hard + 0.7 * soft).sum() / mask.sum()
    options = {"temperature": temperature, "beta": beta, "skew": skew, "student_bias": student[2], "mask": mask}
    result = fused_linear_kd(*student[:2], *teacher, labels, alpha=0.3, chunk_size=5, **options)
    items = fused_linear_kd_items(*student[:2], *teacher, labels, chunk_size=5, **options)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(tuple(items), (hard, soft))
    expected_gradients = gradients(expected, student)
    torch.testing.assert_close(gradients(result.loss, student), expected_gradients)
    torch.testing.assert_close(
        gradients((0.3 * items.hard + 0.7 * items.soft).sum() / mask.sum(), student), expected_gradients
    )


@pytest.mark.parametrize("beta", [0, 1])
@pytest.mark.parametrize("skew", [1e-3, 0.5])
def test_skewed_divergences_are_finite_at_extremes(beta, skew):
    hidden = torch.tensor([[1e4, -1e4], [0.0, 0.0]], requires_grad=True)
    result = fused_linear_kd(
        hidden, torch.eye(2), hidden.detach().flip(1), torch.eye(2), alpha=0.0, beta=beta, skew=skew
    )
    assert 0 <= result.loss <= -math.log(skew)
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    assert gradient.isfinite().all()


def test_a_skew_needs_one_side(tensors):
    student, teacher, _, _ = tensors
    with pytest.raises(ValueError, match=r"`skew` needs `beta` 0 .* got skew=0.1 and beta=0.5"):
        fused_linear_kd(*student[:2], *teacher, beta=0.5, skew=0.1)
    with pytest.raises(ValueError, match=r"`skew` must be in \[0, 1\), got 1.0"):
        FusedKD(skew=1.0)


@pytest.mark.parametrize("threshold", [0, 2**40], ids=["chunks", "logits"])
def test_the_term_is_skewed_in_both_ways(tensors, monkeypatch, threshold):
    monkeypatch.setattr(fused, "PLAIN_BYTES", threshold)
    student, teacher, labels, mask = (tensors[0], tensors[1], *tensors[2:])
    heads = [torch.nn.Linear(d, V, bias=False, dtype=torch.float64) for d in (D, D_TEACHER)]
    said, taught = Outputs(hidden=student[0], head=heads[0]), Outputs(hidden=teacher[0], head=heads[1])
    value = FusedKD(0.3, beta=1, skew=0.2)(Step({}, said, taught, labels, mask, temperature=2.0))
    z_s, z_t = heads[0](student[0]), heads[1](teacher[0])
    soft = skewed_kl_divergence(z_s, z_t, skew=0.2, direction="reverse", temperature=2.0)
    expected = (0.3 * cross_entropy(z_s, labels) + 0.7 * soft)[mask].mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_items_equal_the_plain_items(tensors, temperature, beta):
    """With weights that themselves get a gradient, two backwards through one graph, and values logged on the way."""
    student, teacher, labels, mask = tensors
    z_s, z_t = logits(student, teacher)
    expected = (
        cross_entropy(z_s, labels).where(mask, 0),
        jensen_shannon_divergence(z_s, z_t, beta=beta, temperature=temperature).where(mask, 0),
    )
    options = {"temperature": temperature, "beta": beta, "student_bias": student[2], "mask": mask, "chunk_size": 5}
    items = fused_linear_kd_items(*student[:2], *teacher, labels, **options)
    torch.testing.assert_close(tuple(items), expected)

    weights = torch.rand(2, N, dtype=torch.float64, requires_grad=True)
    weighted, expected_weighted = ((weights * torch.stack(pair)).sum() for pair in (tuple(items), expected))
    inputs = [*student, weights]
    first = torch.autograd.grad(weighted, inputs, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(expected_weighted, inputs))
    torch.testing.assert_close(torch.autograd.grad(weighted, inputs), first)


@pytest.mark.parametrize("with_tail", [True, False], ids=["tail", "renormalised"])
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.chapter("A70")
def test_sparse_equals_the_plain_top_k_loss(tensors, temperature, beta, with_tail):
    if beta == 1 and not with_tail:
        pytest.skip("infinite, and refused")
    student, teacher, labels, mask = tensors
    ids, log_probs, tail = top_k(teacher, temperature)
    target = ids, log_probs, tail if with_tail else None
    z_s = logits(student, teacher)[0]
    hard = cross_entropy(z_s, labels).where(mask, 0)
    soft = topk_kl(z_s, *target, temperature=temperature, beta=beta).where(mask, 0)
    expected = (0.3 * hard + 0.7 * soft).sum() / mask.sum()

    options = {"temperature": temperature, "beta": beta, "student_bias": student[2], "mask": mask, "chunk_size": 5}
    result = sparse_kd(*student[:2], *target, labels, alpha=0.3, **options)
    torch.testing.assert_close(result, (expected, hard.sum() / mask.sum(), soft.sum() / mask.sum()))
    expected_gradients = gradients(expected, student)
    torch.testing.assert_close(gradients(result.loss, student), expected_gradients)

    items = sparse_kd_items(*student[:2], *target, labels, **options)
    torch.testing.assert_close(tuple(items), (hard, soft))
    combined = (0.3 * items.hard + 0.7 * items.soft).sum() / mask.sum()
    torch.testing.assert_close(gradients(combined, student), expected_gradients)


@pytest.mark.chapter("A01")
def test_golden_kd_loss(golden):
    """With the identity for an output layer, hidden states are logits."""
    case = golden("kd_loss_forward")
    z_s, z_t, labels = (case.inputs[name] for name in ("student_logits", "teacher_logits", "labels"))
    eye = torch.eye(4, dtype=torch.float64)
    options = {"temperature": case.inputs["tau"], "alpha": case.inputs["alpha"]}
    result = fused_linear_kd(z_s, eye, z_t, eye, labels.long(), **options)
    for value, name in ((result.loss, "total"), (result.hard, "ce"), (result.soft, "kl")):
        torch.testing.assert_close(value.item(), case.expected[name], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("A03")
@pytest.mark.parametrize(("name", "beta", "expected"), [("kd_loss_reverse", 1.0, "kl"), ("kd_loss_js", 0.5, "js")])
def test_golden_directions(golden, name, beta, expected):
    case = golden(name)
    eye = torch.eye(4, dtype=torch.float64)
    z_s, z_t = case.inputs["student_logits"], case.inputs["teacher_logits"]
    value = fused_linear_kd(z_s, eye, z_t, eye, temperature=case.inputs["tau"], beta=beta).soft
    torch.testing.assert_close(value.item(), case.expected[expected], rtol=case.rtol, atol=case.atol)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_float32_is_within_1e5_of_float64(tensors, temperature):
    student, teacher, labels, _ = tensors
    exact = fused_linear_kd(*student[:2], *teacher, labels, temperature=temperature, student_bias=student[2])
    single = [x.detach().float().requires_grad_() for x in student]
    result = fused_linear_kd(
        *single[:2], *(x.float() for x in teacher), labels, temperature=temperature, student_bias=single[2]
    )
    assert result.loss.dtype == torch.float32
    for value, expected in zip(
        (result.loss, *gradients(result.loss, single)), (exact.loss, *gradients(exact.loss, student)), strict=True
    ):
        assert (value - expected).norm() <= 1e-5 * expected.norm()


def test_any_split_gives_the_same_gradient(tensors):
    """Micro-batches, each divided by the count of the whole step."""
    student, teacher, labels, mask = tensors
    whole = fused_linear_kd(*student[:2], *teacher, labels, mask=mask)
    parts = [
        fused_linear_kd(
            student[0][rows], student[1], teacher[0][rows], teacher[1], labels[rows], mask=mask[rows], count=n
        )
        for n, rows in ((mask.sum(), slice(0, 5)), (mask.sum().item(), slice(5, N)))
    ]
    assert mask[:5].sum() != mask[5:].sum()
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    expected = gradients(whole.loss, student[:2])
    torch.testing.assert_close(gradients(sum(part.loss for part in parts), student[:2]), expected)


def test_unlabelled_items_are_distilled_and_count(tensors):
    student, teacher, labels, _ = tensors
    without = fused_linear_kd(*student[:2], *teacher, torch.full_like(labels, -100))
    assert without.hard == 0
    torch.testing.assert_close(without, fused_linear_kd(*student[:2], *teacher))
    torch.testing.assert_close(without.soft, fused_linear_kd(*student[:2], *teacher, labels).soft)


def test_what_is_masked_cannot_be_seen(tensors):
    """Not even NaN; and neither can an item of weight 0."""
    student, teacher, labels, mask = tensors
    expected = fused_linear_kd(*student[:2], *teacher, labels, mask=mask)
    expected_gradients = gradients(expected.loss, student[:2])
    hidden = student[0].detach().masked_fill(~mask[:, None], math.nan).requires_grad_()
    spoiled = teacher[0].masked_fill(~mask[:, None], math.nan), teacher[1]
    for exclusion in ({"mask": mask}, {"weights": mask.double(), "count": mask.sum()}):
        result = fused_linear_kd(hidden, student[1], *spoiled, labels, **exclusion)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradients(result.loss, [hidden, student[1]]), expected_gradients)


@pytest.mark.parametrize("function", [fused_linear_kd, fused_linear_kd_items, sparse_kd, sparse_kd_items])
@pytest.mark.parametrize("empty", ["all masked", "no items"])
def test_nothing_to_learn_from_gives_zero_with_a_graph(tensors, function, empty):
    student, teacher, labels, mask = tensors
    n = N if empty == "all masked" else 0
    target = teacher if function in (fused_linear_kd, fused_linear_kd_items) else top_k(teacher)
    target = [x[:n] if len(x) == N else x for x in target]
    mask = torch.zeros(n, dtype=torch.bool) if empty == "all masked" else None
    result = function(student[0][:n], student[1], *target, labels[:n], student_bias=student[2], mask=mask)
    loss = sum(x.sum() for x in result)
    assert loss == 0
    for gradient in gradients(loss, student):
        assert (gradient == 0).all()


def test_items_may_have_any_shape_and_temperatures_of_their_own(tensors):
    student, teacher, labels, _ = tensors
    temperatures = torch.linspace(0.5, 4, N - 1, dtype=torch.float64)
    z_s, z_t = (z[:-1] for z in logits(student, teacher))
    expected = jensen_shannon_divergence(z_s, z_t, beta=0.3, temperature=temperatures)
    labels, temperatures = (x.unflatten(0, (2, -1)) for x in (labels[:-1], temperatures))
    hidden, teacher_hidden = (x[:-1].unflatten(0, (2, -1)) for x in (student[0], teacher[0]))
    options = {"temperature": temperatures, "beta": 0.3, "student_bias": student[2]}
    items = fused_linear_kd_items(hidden, student[1], teacher_hidden, teacher[1], labels, **options)
    assert items.soft.shape == (2, (N - 1) // 2)
    torch.testing.assert_close(items.soft.flatten(), expected)
    result = fused_linear_kd(hidden, student[1], teacher_hidden, teacher[1], alpha=0.0, **options)
    torch.testing.assert_close(gradients(result.loss, student), gradients(expected.mean(), student))


def test_scale_by_t2_can_be_switched_off(tensors):
    student, teacher, *_ = tensors
    options = {"temperature": 3.0, "alpha": 0.0}
    scaled = fused_linear_kd(*student[:2], *teacher, **options).loss
    unscaled = fused_linear_kd(*student[:2], *teacher, scale_by_t2=False, **options).loss
    torch.testing.assert_close(scaled, 9 * unscaled)
    torch.testing.assert_close(gradients(scaled, student[:2]), gradients(9 * unscaled, student[:2]))


def test_padded_vocabularies(tensors):
    student, teacher, labels, _ = tensors
    padded = F.pad(student[1].detach(), (0, 0, 0, 11), value=7.0).requires_grad_()
    bias = F.pad(student[2].detach(), (0, 11), value=7.0).requires_grad_()
    teacher_bias = torch.randn(V + 3, dtype=torch.float64)
    teacher_weight = F.pad(teacher[1], (0, 0, 0, 3), value=9.0)
    expected = fused_linear_kd(
        *student[:2], *teacher, labels, student_bias=student[2], teacher_bias=teacher_bias[:V], temperature=2.0
    )
    result = fused_linear_kd(
        student[0], padded, teacher[0], teacher_weight, labels, vocabulary=V,
        student_bias=bias, teacher_bias=teacher_bias, temperature=2.0,
    )  # fmt: skip
    torch.testing.assert_close(result, expected)
    expected_gradients = gradients(expected.loss, student)
    hidden, weight, of_bias = gradients(result.loss, [student[0], padded, bias])
    torch.testing.assert_close((hidden, weight[:V], of_bias[:V]), expected_gradients)
    assert (weight[V:] == 0).all()
    assert (of_bias[V:] == 0).all()


def test_frozen_parts_get_no_gradient(tensors):
    student, teacher, labels, _ = tensors
    expected = gradients(fused_linear_kd(*student[:2], *teacher, labels).loss, student[:2])
    hidden, weight = (x.detach() for x in student[:2])
    for function in (fused_linear_kd, fused_linear_kd_items):
        for frozen in (0, 1):
            pair = [hidden.clone().requires_grad_(frozen == 1), weight.clone().requires_grad_(frozen == 0)]
            result = function(*pair, *teacher, labels)
            loss = result.loss if function is fused_linear_kd else (result.hard + result.soft).mean() / 2
            loss.backward()
            assert pair[frozen].grad is None
            torch.testing.assert_close(pair[1 - frozen].grad, expected[1 - frozen])


def test_the_teacher_gets_no_gradient_and_no_grad_gives_values(tensors):
    student, teacher, labels, _ = tensors
    trainable = [x.requires_grad_() for x in teacher]
    result = fused_linear_kd(*student[:2], *trainable, labels)
    result.loss.backward()
    assert all(x.grad is None for x in trainable)
    with torch.no_grad():
        values = fused_linear_kd(*student[:2], *teacher, labels)
    assert not values.loss.requires_grad
    torch.testing.assert_close(values, tuple(x.detach() for x in result))


def test_zero_at_equality():
    hidden, weight = torch.randn(5, 8), torch.randn(50, 8)
    for beta in (0.0, 0.5, 1.0):
        result = fused_linear_kd(hidden.requires_grad_(), weight, hidden, weight, beta=beta, temperature=2.0, alpha=0.0)
        assert result.loss.abs() < 1e-6
        assert gradients(result.loss, [hidden])[0].abs().max() < 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_extremes(dtype, temperature, beta):
    hidden = torch.tensor([[1e4, -1e4], [0.0, 1.0], [-1e4, 1e4]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4], [3.0, -1.0], [1e4, 1e4]], dtype=dtype), weight.detach()
    options = {"temperature": temperature, "beta": beta}
    result = fused_linear_kd(hidden, weight, *teacher, torch.tensor([0, 1, 2]), **options)
    assert result.loss.isfinite()
    assert all(x.isfinite().all() for x in gradients(result.loss, [hidden, weight]))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
def test_finite_in_float16_as_far_as_float16_goes(temperature):
    """Logits of 1e4; the gradient of the output layer is a sum over tokens of hidden states, so these are smaller."""
    hidden = torch.tensor([[10.0, -10.0], [0.0, 1.0]], dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[1000.0, 0.0], [0.0, 1000.0], [500.0, 500.0]], dtype=torch.float16, requires_grad=True)
    result = fused_linear_kd(hidden, weight, hidden.detach().flip(0), weight.detach(), temperature=temperature)
    assert result.loss.isfinite()
    assert all(x.isfinite().all() for x in gradients(result.loss, [hidden, weight]))


def test_one_class():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(1, 4)
    result = fused_linear_kd(hidden, weight, hidden.detach(), weight, torch.zeros(3, dtype=torch.long))
    assert result.loss == 0
    assert (gradients(result.loss, [hidden])[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs(tensors, dtype):
    """Value within 1e-4 of float64 on the same logits; gradients within the rounding of their dtype."""
    student, teacher, labels, _ = tensors
    half = [x.detach().to(dtype).requires_grad_() for x in student]
    half_teacher = [x.to(dtype) for x in teacher]
    z_s, z_t = (z.double() for z in logits(half, half_teacher))
    hard, soft = cross_entropy(z_s, labels).mean(), kl_divergence(z_s, z_t, temperature=2.0).mean()
    result = fused_linear_kd(*half[:2], *half_teacher, labels, student_bias=half[2], temperature=2.0, chunk_size=6)
    assert result.loss.dtype == torch.float32
    for value, expected in ((result.hard, hard), (result.soft, soft)):
        torch.testing.assert_close(value.item(), expected.item(), rtol=1e-4, atol=0)
    for value, expected in zip(gradients(result.loss, half), gradients((hard + soft) / 2, half), strict=True):
        assert value.dtype == dtype
        assert (value.double() - expected.double()).norm() <= 2e-2 * expected.double().norm()


def test_autocast_computes_softmax_in_single_precision(tensors):
    """CPU autocast runs `log_softmax` in bfloat16, which costs the gradient of a small KL several percent."""
    student, _, labels, _ = tensors
    single = [x.detach().float().requires_grad_() for x in student]
    near = [single[0].detach() + 0.05 * torch.randn(N, D), single[1].detach()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_s, z_t = (z.double() for z in (F.linear(*single[:2]), F.linear(*near)))
        results = fused_linear_kd(*single[:2], *near, labels, alpha=0.0, temperature=2.0)
        items = fused_linear_kd_items(*single[:2], *near, labels, temperature=2.0)
    expected = kl_divergence(z_s, z_t, temperature=2.0)
    torch.testing.assert_close(results.soft.item(), expected.mean().item(), rtol=1e-4, atol=0)
    torch.testing.assert_close(items.soft.double(), expected, rtol=1e-3, atol=1e-6)
    expected_gradients = gradients(expected.mean(), single[:2])
    for loss in (results.loss, items.soft.mean()):
        for value, wanted in zip(gradients(loss, single[:2]), expected_gradients, strict=True):
            assert value.dtype == torch.float32
            assert (value - wanted).norm() <= 2e-2 * wanted.norm()


def test_autocast_leaves_the_coarse_softmax_alone(tensors):
    student, teacher, *_ = tensors
    single = [x.detach().float().requires_grad_() for x in student[:2]]
    target = [x if x.dtype == torch.long else x.float() for x in top_k(teacher)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_s = F.linear(*single).double()
        result = sparse_kd(*single, *target, alpha=0.0)
    torch.testing.assert_close(result.loss.item(), topk_kl(z_s, *target).mean().item(), rtol=1e-5, atol=0)


def test_sides_may_differ_in_precision(tensors):
    student, teacher, *_ = tensors
    half_teacher = [x.bfloat16() for x in teacher]
    z_s, z_t = F.linear(*student[:2]), F.linear(*half_teacher).double()
    result = fused_linear_kd(*student[:2], *half_teacher, alpha=0.0)
    torch.testing.assert_close(result.loss, kl_divergence(z_s, z_t).mean())


def test_gradients_survive_the_loss_scale_of_float16():
    """The gradient by a logit is near 1e-8 here, nothing in float16, unless it is divided by the count at the end."""
    vocabulary, tokens = 4096, 512
    hidden, weight = torch.randn(tokens, 8), torch.randn(vocabulary, 8) / 100
    half = [x.half().requires_grad_() for x in (hidden, weight)]
    teacher = torch.randn(tokens, 8).half(), torch.randn(vocabulary, 8).half() / 100
    z_s, z_t = F.linear(*(x.detach().float() for x in half)).requires_grad_(), F.linear(*(x.float() for x in teacher))
    (wanted,) = gradients(kl_divergence(z_s, z_t).mean() * 2.0**10, [z_s])
    assert wanted.abs().median() < 2.0**-24 * 2**10
    result = fused_linear_kd(*half, *teacher, alpha=0.0)
    value = gradients(result.loss * 2.0**10, half)[1].float()
    expected = wanted.T @ half[0].detach().float()
    assert (value - expected).norm() < 1e-2 * expected.norm()


def test_weight_gradient_is_handed_over_without_a_copy():
    """The buffer that the forward filled becomes ``weight.grad``; a copy would double the peak memory."""
    weight = torch.randn(500, 64, requires_grad=True)
    hidden = torch.randn(10, 64)
    loss = fused_linear_kd(hidden, weight, hidden, torch.randn(500, 64)).loss
    buffer = loss.grad_fn.next_functions[0][0].gradients[1]
    address = buffer.data_ptr()
    del buffer
    loss.backward()
    assert weight.grad.data_ptr() == address


def test_second_backward_says_what_to_use(tensors):
    student, teacher, labels, _ = tensors
    loss = fused_linear_kd(*student[:2], *teacher, labels).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"used up by the first backward.*`fused_linear_kd_items`"):
        loss.backward()


def test_second_derivatives_are_refused_rather_than_wrong(tensors):
    student, teacher, labels, _ = tensors
    for function in (fused_linear_kd, fused_linear_kd_items):
        value = function(*student[:2], *teacher, labels)[0].sum()
        with pytest.raises(RuntimeError, match="no second derivatives, so `create_graph=True`"):
            torch.autograd.grad(value, student[:1], create_graph=True)


# torch 2.13 makes an instance of each autograd.Function that it traces, and warns about that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("function", [fused_linear_kd, fused_linear_kd_items])
def test_compiles_as_one_graph_of_the_same_size_for_any_number_of_chunks(tensors, function):
    student, teacher, labels, mask = tensors
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def loss(hidden, weight, chunk_size):
        result = function(hidden * 1, weight, *teacher, labels, mask=mask, temperature=2.0, chunk_size=chunk_size)
        return result.loss if function is fused_linear_kd else (result.hard + result.soft).mean()

    for chunk_size in (100, 1):
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        value, expected = compiled(*student[:2], chunk_size), loss(*student[:2], chunk_size)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradients(value, student[:2]), gradients(expected, student[:2]))
    assert len(graphs) == 2
    assert graphs[0] == graphs[1]


@pytest.mark.slow
def test_operator_keeps_its_promises_to_the_compiler(tensors):
    """Shapes and dtypes of the fake kernel, no aliasing, no mutation."""
    student, teacher, labels, mask = tensors
    hidden, weight, bias = (x.detach() for x in student)
    scale = torch.ones(N, dtype=torch.float64)
    options = (2.0, 1.0, 0.2, True, -100, V, 8, torch.float64, torch.float64, True, True, True)
    arguments = (hidden, weight, bias, *teacher, None, None, None, labels, mask, None, scale, scale, *options)
    torch.library.opcheck(torch.ops.lightning_distill.linear_kd.default, arguments)


def test_default_chunks_are_set_by_bytes():
    assert default_chunk_size("cpu", 32768, torch.float32) == 320
    assert default_chunk_size("cpu", 2**20, torch.float32) == 128
    assert default_chunk_size("cuda", 2**17, torch.bfloat16) == 1024


def test_errors(tensors):
    student, teacher, labels, mask = tensors
    pair = student[:2]
    with pytest.raises(ValueError, match=r"student's vocabulary has 101 entries, the teacher's 90.*`vocabulary=90`"):
        fused_linear_kd(*pair, teacher[0], teacher[1][:90])
    with pytest.raises(ValueError, match=r"`vocabulary` must be from 1 to 101, .* got 102"):
        fused_linear_kd(*pair, *teacher, vocabulary=102)
    with pytest.raises(
        ValueError, match=r"`teacher_hidden` has items of shape \(22,\), `student_hidden` of shape \(23,\)"
    ):
        fused_linear_kd(*pair, teacher[0][1:], teacher[1])
    with pytest.raises(
        ValueError, match=r"`student_hidden` must have the shape \(items..., d\) .* \(23, 16\) and \(16, 101\)"
    ):
        fused_linear_kd(pair[0], pair[1].T, *teacher)
    with pytest.raises(ValueError, match=r"`student_bias` must have the shape \(101,\), got \(100,\)"):
        fused_linear_kd(*pair, *teacher, student_bias=student[2][1:])
    with pytest.raises(ValueError, match=r"`teacher_hidden` is torch\.float64 and `teacher_weight` torch\.float32"):
        fused_linear_kd(*pair, teacher[0], teacher[1].float())
    with pytest.raises(ValueError, match=r"`teacher_hidden` must be floating-point, got torch\.int64"):
        fused_linear_kd(*pair, teacher[0].long(), teacher[1])
    for name, value in {
        "labels": labels[1:],
        "mask": mask[1:],
        "weights": torch.ones(22),
        "temperature": torch.ones(22),
    }.items():
        with pytest.raises(ValueError, match=rf"`{name}` must have the shape of the items, \(23,\), got \(22,\)"):
            fused_linear_kd(*pair, *teacher, **{name: value})
    with pytest.raises(ValueError, match=r"`mask` must be boolean, got torch\.int64: use `mask\.bool\(\)`"):
        fused_linear_kd(*pair, *teacher, mask=mask.long())
    with pytest.raises(ValueError, match=r"`weights` get no gradient here.*`fused_linear_kd_items`"):
        fused_linear_kd(*pair, *teacher, weights=torch.ones(N, requires_grad=True))
    for name, rule in {
        "alpha": r"in \[0, 1\]",
        "beta": r"in \[0, 1\]",
        "temperature": "positive",
        "chunk_size": "positive",
    }.items():
        with pytest.raises(ValueError, match=f"`{name}` must be {rule}.*, got (nan|-1)"):
            fused_linear_kd(*pair, *teacher, **{name: -1 if name == "chunk_size" else math.nan})
    ids, log_probs, tail = top_k(teacher)
    with pytest.raises(ValueError, match="`ids` and `log_probs` must have the shape"):
        sparse_kd(*pair, ids[1:], log_probs, tail)
    with pytest.raises(ValueError, match=r"`beta=1` .* is infinite without `tail_log_prob`"):
        sparse_kd_items(*pair, ids, log_probs, None, beta=1.0)
