"""Convergence of self-distillation, measured."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize
from scipy.special import rel_entr
from torch import nn

from lightning_distill.diagnostics import (
    ban_operator,
    convergence_diagnostics,
    ema_convergence_slope,
    ema_report,
    fit_generation_bound,
    fixed_point_gap,
    ridge_generations,
    sd_regularizer,
)


def distributions(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).softmax(-1)


@pytest.mark.chapter("B01", api="lightning_distill.diagnostics.ban_operator")
def test_forward_update_matches_golden_and_an_optimizer(golden):
    case = golden("born_again_update_forward")
    f, y, lam = case.inputs["teacher_probs"], case.inputs["label_onehot"], float(case.inputs["lam"])
    found = ban_operator(f, y, lam)
    torch.testing.assert_close(found, case.expected["next_probs"], rtol=case.rtol, atol=case.atol)

    def loss(z):
        g = np.exp(z - np.logaddexp.reduce(z))
        return -(y.numpy() * np.log(g)).sum() + lam * rel_entr(f.numpy(), g).sum()

    best = minimize(loss, np.zeros(3), tol=1e-12).x
    np.testing.assert_allclose(found.numpy(), np.exp(best - np.logaddexp.reduce(best)), atol=1e-4)


@pytest.mark.chapter("B02", api="lightning_distill.diagnostics.sd_regularizer")
def test_the_regularizer_matches_golden(golden):
    case = golden("sd_regulariser")
    p_next, p_previous = case.inputs["next_probs"], case.inputs["prev_probs"]
    assert sd_regularizer(p_next, p_previous).item() == pytest.approx(float(case.expected["reverse_kl"]), rel=case.rtol)
    forward = sd_regularizer(p_next, p_previous, direction="forward")
    assert forward.item() == pytest.approx(float(case.expected["forward_kl"]), rel=case.rtol)
    assert sd_regularizer(p_next, p_next).item() == pytest.approx(0, abs=1e-15)
    excluded = sd_regularizer(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]))
    assert excluded.item() == math.inf
    assert sd_regularizer(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5])).item() == pytest.approx(math.log(2))


@pytest.mark.chapter("B03", api="lightning_distill.diagnostics.fixed_point_gap")
@pytest.mark.erratum("ERR-33")
def test_the_fixed_point_is_the_label_itself(golden):
    case = golden("born_again_fixed_point")
    f, y, lam = case.inputs["f0"], case.inputs["soft_label"], float(case.inputs["lam"])
    for _ in range(60):
        f, before = ban_operator(f, y, lam), f
    torch.testing.assert_close(f, case.expected["fixed_point"], rtol=case.rtol, atol=case.atol)
    assert fixed_point_gap(before, f) < 1e-9
    assert fixed_point_gap(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])) == (
        pytest.approx(math.sqrt(2) / 2)
    )


@pytest.mark.chapter("B15", api="lightning_distill.diagnostics.ban_operator")
def test_forward_generations_contract_at_the_golden_rate(golden):
    case = golden("born_again_contraction")
    f, y, lam = case.inputs["f0"], case.inputs["label"], float(case.inputs["lam"])
    errors = []
    for _ in range(int(case.inputs["generations"])):
        errors.append((f - y).norm())
        f = ban_operator(f, y, lam)
    torch.testing.assert_close(torch.stack(errors), case.expected["errors"], rtol=case.rtol, atol=case.atol)
    one, other, labels = distributions(20, 5, seed=1), distributions(20, 5, seed=2), distributions(20, 5, seed=3)
    after = (ban_operator(one, labels, 3.0) - ban_operator(other, labels, 3.0)).norm()
    assert (after / (one - other).norm()).item() == pytest.approx(0.75)


@pytest.mark.chapter("X4", api="lightning_distill.diagnostics.ban_operator")
def test_rate_of_exercise_4(golden):
    case = golden("exercise4_rate")
    for lam, gamma in zip(case.inputs["lam"].tolist(), case.expected["gamma"].tolist(), strict=True):
        f, y = distributions(3, seed=4), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
        g = ban_operator(f, y, lam)
        assert ((g - y).norm() / (f - y).norm()).item() == pytest.approx(gamma, rel=1e-9)


@pytest.mark.chapter("B15", "X4", api="lightning_distill.diagnostics.ban_operator")
@pytest.mark.erratum("ERR-38")
def test_the_printed_operator_is_no_contraction(golden):
    case = golden("born_again_update_reverse")
    f = case.inputs["f_true_label"]
    pairs = torch.stack([f, 1 - f], dim=1)
    label = torch.tensor([1.0, 0.0], dtype=torch.float64).expand_as(pairs)
    found = ban_operator(pairs, label, float(case.inputs["lam"]), direction="reverse")[:, 0]
    torch.testing.assert_close(found, case.expected["next_prob"], rtol=1e-7, atol=1e-9)
    step = 1e-4 * f
    moved = ban_operator(torch.stack([f + step, 1 - f - step], dim=1), label, 1.0, direction="reverse")[:, 0]
    torch.testing.assert_close((moved - found) / step, case.expected["derivative"], rtol=2e-3, atol=0)
    assert ((moved - found) / step).max() > 100  # forward it is 0.5 everywhere
    gain = found.logit() - f.logit()
    assert (gain >= 1).all()  # of the logit, in each generation


@pytest.mark.chapter("B15")
def test_reverse_update_solves_the_printed_problem_for_soft_labels_and_many_classes():
    f, y, lam = distributions(4, seed=5), distributions(4, seed=6), 0.7
    found = ban_operator(f, y, lam, direction="reverse")

    def loss(z):
        g = np.exp(z - np.logaddexp.reduce(z))
        return -(y.numpy() * np.log(g)).sum() + lam * rel_entr(g, f.numpy()).sum()

    best = minimize(loss, f.log().numpy(), tol=1e-13).x
    np.testing.assert_allclose(found.numpy(), np.exp(best - np.logaddexp.reduce(best)), atol=2e-5)
    one_hot = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    g = ban_operator(f, one_hot, lam, direction="reverse")[1].item()
    root = brentq(lambda p: math.log(p / (1 - p)) - f[1].logit().item() - 1 / (lam * p), 1e-12, 1 - 1e-12)
    assert g == pytest.approx(root, rel=1e-8)


@pytest.mark.chapter("B16", api="lightning_distill.diagnostics.convergence_diagnostics")
def test_kernel_ridge_generations_match_golden(golden):
    case = golden("born_again_kernel_ridge")
    x, y = case.inputs["x"], case.inputs["y"]
    kernel = torch.exp(-((x[:, None] - x[None]) ** 2) / 2)
    found = ridge_generations(
        kernel, y, float(case.inputs["ridge"]), float(case.inputs["lam"]), int(case.inputs["generations"])
    )
    torch.testing.assert_close(found.fixed_point, case.expected["fixed_point"], rtol=case.rtol, atol=case.atol)
    expected = case.expected["errors"]
    torch.testing.assert_close(found.errors[: len(expected)], expected, rtol=case.rtol, atol=case.atol)
    assert found.rate_bound == pytest.approx(float(case.expected["gamma_bound"]), rel=case.rtol)
    assert ((found.errors[1:] / found.errors[:-1]) <= found.rate_bound).all()
    assert (found.fixed_point - y).norm() > 0.5  # not the labels: capacity is limited
    report = convergence_diagnostics(list(found.predictions))
    assert max(report.rates) < found.rate_bound
    assert report.verdict() == "supported"
    assert (report.limit - found.fixed_point).norm() < 0.5 * found.errors[-1]
    assert math.isnan(report.divergences[0])  # no probabilities


@pytest.mark.chapter("B16", api="lightning_distill.diagnostics.convergence_diagnostics")
def test_the_report_of_exact_generations_has_the_rate_and_the_limit():
    labels = distributions(30, 4, seed=1)
    f = [distributions(30, 4, seed=2)]
    for _ in range(5):
        f.append(ban_operator(f[-1], labels, 1.5))
    report = convergence_diagnostics(f, labels)
    assert report.rates == pytest.approx([0.6] * 4)
    assert report.rate == pytest.approx(0.6)
    torch.testing.assert_close(report.limit, labels)
    assert report.label_distances == pytest.approx([report.label_distances[0] * 0.6**k for k in range(6)])
    forward = rel_entr(f[0].numpy(), f[1].numpy()).sum(-1).mean()
    assert report.divergences[0] == pytest.approx(forward)
    assert report.verdict() == "supported"
    assert convergence_diagnostics(f, noise=1.0).verdict() == "undecided"
    assert convergence_diagnostics(f[:3]).verdict() == "undecided"
    assert convergence_diagnostics(f[::-1]).verdict() == "refuted"
    torch.testing.assert_close(convergence_diagnostics(f[:2]).limit, f[1])
    alternating = convergence_diagnostics([f[0], f[1], f[0], f[1]])
    torch.testing.assert_close(alternating.limit, f[1])  # nothing to extrapolate
    same = convergence_diagnostics([labels, labels, labels])
    assert same.gaps == (0.0, 0.0)
    assert math.isnan(same.rate)


@pytest.mark.chapter("B17", api="lightning_distill.diagnostics.fit_generation_bound")
def test_gains_and_the_best_generation():
    bound = fit_generation_bound([0.30, 0.27, 0.26, 0.262], n=300)
    assert bound.gains == pytest.approx([0.03, 0.01, -0.002])
    assert bound.best == 2
    assert bound.saturated
    assert bound.c == pytest.approx(0.002 / math.sqrt(3 / 300))
    growing = fit_generation_bound([0.30, 0.27, 0.26], n=300)
    assert (growing.c, growing.saturated, growing.best) == (0.0, False, 2)


@pytest.mark.chapter("B17", "B18")
@pytest.mark.erratum("ERR-39")
def test_a_constant_gain_makes_the_printed_bound_negative():
    e0, gain, c, n, k = 0.3, 0.05, 0.5, 10_000, 10
    assert e0 - k * gain + c * math.sqrt(k / n) == pytest.approx(-0.184, abs=1e-3)
    assert (2, 3) != (3, 5)  # the two numbers of generations after which it is said to saturate


@pytest.mark.chapter("B27", api="lightning_distill.diagnostics.ema_report")
def test_an_average_of_noisy_predictions_is_steadier():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(50, 40, 3, generator=generator).softmax(-1)
    teacher = torch.stack([student[max(i - 9, 0) : i + 1].mean(0) for i in range(50)])[10:]
    report = ema_report(teacher, student[10:])
    assert report.variance_ratio.low < report.variance_ratio.value < report.variance_ratio.high < 0.3
    assert report.verdict() == "supported"
    assert math.isnan(report.distance)
    assert ema_report(student[10:], teacher).verdict() == "refuted"
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    flat = [nn.utils.parameters_to_vector(network.parameters()).detach() for network in (one, other)]
    found = ema_report(teacher, student[10:], teacher=one, student=other)
    assert found.distance == pytest.approx(((flat[0] - flat[1]).norm() / flat[1].norm()).item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.chapter("B29", api="lightning_distill.diagnostics.ema_convergence_slope")
def test_the_average_has_the_rate_of_plain_gradient_descent():
    found = ema_convergence_slope()
    assert found.slope.value == pytest.approx(-0.5, abs=0.1)
    for values in (found.last, found.averaged):
        assert 0.35 < values[2] / values[1] < 0.65
    assert found.averaged[2] < found.last[2]


@pytest.mark.chapter("B29")
def test_the_slope_reports_its_uncertainty():
    found = ema_convergence_slope((100, 400), seeds=50)
    assert found.slope.low < found.slope.value < found.slope.high
    ratio = math.log(found.averaged[1] / found.averaged[0]) / math.log(4)
    assert found.slope.value == pytest.approx(ratio)


BAD = {
    "shapes": (lambda: fixed_point_gap(torch.ones(2), torch.ones(3)), r"same shape, got \(2,\) and \(3,\)"),
    "direction": (lambda: ban_operator(*[torch.ones(2) / 2] * 2, 1.0, direction="both"), "`direction` must be"),
    "lam": (lambda: ban_operator(*[torch.ones(2) / 2] * 2, 0.0), "`lam`, the weight .* must be positive"),
    "one generation": (lambda: convergence_diagnostics([torch.ones(2, 2)]), "two or more generations, got 1"),
    "one error": (lambda: fit_generation_bound([0.1], 10), "two or more generations, got 1"),
    "no samples": (lambda: fit_generation_bound([0.1, 0.2], 0), "`n`, the number of training samples, .* got 0"),
    "ridge": (lambda: ridge_generations(torch.eye(2), torch.ones(2), 0.0, 1.0, 1), "`ridge` must be positive, got 0.0"),
    "kernel": (lambda: ridge_generations(torch.eye(3), torch.ones(2), 1.0, 1.0, 1), r"shape \(2, 2\) for these"),
    "moments": (lambda: ema_report(torch.ones(1, 2, 2), torch.ones(1, 2, 2)), "two or more moments, got one"),
    "moments' shape": (lambda: ema_report(torch.ones(2, 2), torch.ones(2, 2)), r"shape \(moments, items, classes\)"),
    "steps": (lambda: ema_convergence_slope((10,)), "`steps` must be two or more positive numbers"),
    "horizon": (lambda: ema_convergence_slope((1, 2), horizon=1.0), "`horizon` above 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
