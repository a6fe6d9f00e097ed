"""Models of quantization errors, against closed forms and other programs."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from lightning_distill.diagnostics import joint_error, quantization_error, recovery_bound_fit

API = "lightning_distill.diagnostics."


@pytest.mark.chapter("D06", api=API + "joint_error")
def test_joint_error_is_the_golden_one(golden):
    case = golden("joint_error_gamma")
    found = joint_error(case.inputs["e_quant"], case.inputs["e_distill"])
    assert found.quantization == pytest.approx(case.expected["E_quant"], rel=case.rtol)
    assert found.distillation == pytest.approx(case.expected["E_distill"], rel=case.rtol)
    assert found.total == pytest.approx(case.expected["E_total"], rel=case.rtol)
    assert found.gamma == pytest.approx(case.expected["gamma_hat"], rel=case.rtol)


@pytest.mark.erratum("ERR-57")
@pytest.mark.chapter("D06")
def test_a_factor_of_two_always_suffices_so_the_bound_says_nothing():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        e_q, e_d = torch.randn(2, 5, generator=generator, dtype=torch.float64)
        found = joint_error(e_q, e_d)
        scale = math.sqrt(found.quantization * found.distillation)
        assert found.total == pytest.approx(found.quantization + found.distillation + found.gamma * scale)
        assert found.gamma == pytest.approx(2 * torch.cosine_similarity(e_q, e_d, dim=0).item())
        assert found.total <= found.quantization + found.distillation + 2 * scale + 1e-12
        # for norms no such term is needed at all
        assert (e_q + e_d).norm() <= e_q.norm() + e_d.norm() + 1e-12
    e = torch.tensor([3.0, -4.0])
    assert joint_error(e, 2 * e).gamma == pytest.approx(2)
    assert joint_error(e, -e).gamma == pytest.approx(-2)
    assert math.isnan(joint_error(e, torch.zeros(2)).gamma)
    with pytest.raises(ValueError, match=r"the same shape and not be empty, got \(2,\) and \(3,\)"):
        joint_error(e, torch.zeros(3))


@pytest.mark.chapter("D32", api=API + "quantization_error")
def test_quantization_error_is_the_golden_one(golden):
    case = golden("quant_error_model")
    w, scale = case.inputs["w"], case.inputs["scale"]
    quantized = (w / scale).round().clamp(-7, 7) * scale
    torch.testing.assert_close(w - quantized, case.expected["error"], rtol=case.rtol, atol=case.atol)
    found = quantization_error(w, quantized, scale)
    assert found.mean == pytest.approx(case.expected["mean"], rel=case.rtol)
    assert found.variance == pytest.approx(case.expected["var"], rel=case.rtol)
    assert found.sqnr_db == pytest.approx(case.expected["sqnr_db"], rel=case.rtol)
    assert found.uniform_variance == pytest.approx(case.expected["uniform_var"], rel=case.rtol)
    assert found.uniform_variance_of_square == pytest.approx(case.expected["uniform_var_of_square"], rel=case.rtol)
    assert found.clipped == 1 / 8  # 1.9 lies beyond 7 steps and a half
    assert found.n == 8


@pytest.mark.chapter("D32")
def test_uniform_noise_fits_small_steps_and_not_large_ones():
    w = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for step, fits in ((0.05, True), (0.5, True), (4.0, False)):
        quantized = (w / step).round() * step
        found = quantization_error(w, quantized, step)
        other = kstest(((w - quantized) / step + 0.5).numpy(), "uniform").statistic
        assert found.distance == pytest.approx(other, abs=1e-9)
        assert (found.distance < 0.02) == fits
        assert (abs(found.variance / found.uniform_variance - 1) < 0.03) == fits
        assert found.clipped == 0
        squares = (w - quantized).square()
        assert (abs(squares.var().item() / found.uniform_variance_of_square - 1) < 0.05) == fits


def test_steps_per_channel_and_no_error_at_all():
    w = torch.randn(3, 500)
    steps = torch.tensor([[0.1], [0.01], [0.3]])
    found = quantization_error(w, (w / steps).round() * steps, steps)
    assert found.uniform_variance == pytest.approx((steps.square() / 12).mean().item(), rel=1e-6)
    assert found.distance < 0.05
    exact = quantization_error(w, w, 0.1)
    assert exact.sqnr_db == math.inf
    assert exact.variance == 0
    with pytest.raises(ValueError, match="`step` must be positive, got 0"):
        quantization_error(w, w, 0.0)
    with pytest.raises(ValueError, match="the same shape"):
        quantization_error(w, w[:2], 0.1)


@pytest.mark.chapter("D35", api=API + "recovery_bound_fit")
def test_the_fit_finds_the_constants_of_synthetic_gaps():
    bits = np.array([2, 3, 4, 6, 8] * 3)
    n = np.repeat([100, 1000, 10_000], 5)
    for a, c, d in ((0.8, 2.0, 0.5), (0.3, 1.0, 0.0), (2.0, 1.6, 2.0)):
        fit = recovery_bound_fit(a * 2.0 ** (-c * bits) + d / np.sqrt(n), bits, n, resamples=20)
        assert fit.a == pytest.approx(a, rel=1e-4)
        assert fit.c.value == pytest.approx(c, rel=1e-4)
        assert fit.d == pytest.approx(d, abs=1e-5)
        assert fit.c.low <= c + 1e-3
        assert fit.c.high >= c - 1e-3
        assert fit.residual < 1e-6
        assert fit.c.n == 15


@pytest.mark.chapter("D35")
def test_noisy_gaps_have_an_interval_and_gaps_without_bits_no_rate():
    generator = np.random.default_rng(0)
    bits, n = np.array([2, 3, 4, 5, 6, 8] * 4), np.full(24, 1000)
    gaps = 4.0 ** -(bits - 2.0) * 0.2 + 0.02 + 0.004 * generator.normal(size=24)
    fit = recovery_bound_fit(gaps, bits, n)
    assert fit.c.low < 2 < fit.c.high
    assert fit.c.high - fit.c.low < 2
    assert fit == recovery_bound_fit(gaps, bits, n)
    flat = recovery_bound_fit([0.1, 0.1, 0.1, 0.2], [2, 4, 8, 8], [100, 100, 100, 25])
    assert math.isnan(flat.c.value)
    assert flat.a == 0
    assert flat.d == pytest.approx(1.0)


@pytest.mark.erratum("ERR-64")
@pytest.mark.chapter("D35")
def test_squared_errors_fall_by_four_per_bit_and_not_by_two(golden):
    case = golden("quant_mse_rate")
    bits = case.inputs["bits"]
    step = 2.0 / 2**bits
    per_bit = (step.square() / 12)[:-1] / (step.square() / 12)[1:]
    torch.testing.assert_close(per_bit, case.expected["delta2_over_12_ratio_per_bit"])
    torch.testing.assert_close(step[:-1] / step[1:], case.expected["amplitude_ratio_per_bit"])
    w = torch.rand(50_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = []
    for delta in step.tolist():
        errors.append(quantization_error(w, (w / delta).floor() * delta + delta / 2, delta).variance)
    fit = recovery_bound_fit(errors, bits.tolist(), [1] * len(errors), resamples=10)
    assert fit.c.value == pytest.approx(2, abs=0.02)  # 2 ** -(2 b), where the printed rate is 2 ** -b


def test_bad_runs_are_refused():
    with pytest.raises(ValueError, match=r"with two or more numbers of bits, got 3, 3 and 3 numbers, and bits \[4\]"):
        recovery_bound_fit([0.1, 0.2, 0.1], [4, 4, 4], [10, 10, 10])
    with pytest.raises(ValueError, match="`gaps` and `bits` must be finite, and `n` positive"):
        recovery_bound_fit([0.1, 0.2, 0.1], [4, 4, 8], [10, 10, 0])
    with pytest.raises(ValueError, match="`confidence` must be between 0 and 1, got 1"):
        recovery_bound_fit([0.1, 0.2, 0.1], [4, 4, 8], [10, 10, 10], confidence=1)
    with pytest.raises(ValueError, match="`resamples` must be positive, got 0"):
        recovery_bound_fit([0.1, 0.2, 0.1], [4, 4, 8], [10, 10, 10], resamples=0)
