import pytest
import torch
from torch import nn

from lightning_distill.quantization import (
    QuantSpec,
    affine_scale,
    alternate_scale_and_codes,
    binary_quantize,
    blend,
    codes_of,
    dsq_fake_quantize,
    fake_quantize,
    full_precision,
    grid_of,
    lsq_initial_scale,
    minmax_scale,
    mse_affine_scale,
    mse_scale,
    prepare,
    soft_staircase,
    ternary_quantize,
)

API = "lightning_distill.quantization."


def close(actual, expected, case):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = torch.as_tensor(actual, dtype=torch.float64).reshape(expected.shape)
    torch.testing.assert_close(actual, expected, rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("D11", api=API + "fake_quantize")
def test_symmetric_levels_are_the_known_numbers(golden):
    case = golden("fake_quant_symmetric")
    w = case.inputs["w"].requires_grad_()
    grid = grid_of(case.inputs["bits"], "narrow")
    q = fake_quantize(w, case.inputs["scale"], grid=grid)
    q.sum().backward()
    close(q.detach(), case.expected["q"], case)
    close(codes_of(w.detach(), case.inputs["scale"], grid), case.expected["codes"], case)
    assert torch.equal(w.grad, case.expected["ste_mask"].double())


@pytest.mark.chapter("D11", api=API + "minmax_scale")
def test_minmax_step_is_the_known_number(golden):
    case = golden("fake_quant_minmax")
    w, grid = case.inputs["w"], grid_of(case.inputs["bits"])
    scale = minmax_scale(w, grid)
    q = fake_quantize(w, scale, grid=grid)
    close(scale, case.expected["scale"], case)
    close(q, case.expected["q"], case)
    close((w - q).square().mean(), case.expected["mse"], case)


@pytest.mark.chapter("D11", api=API + "affine_scale")
def test_affine_levels_keep_zero_and_cover_the_range():
    w = torch.tensor([-1.3, -0.61, -0.2, 0.04, 0.25, 0.5, 0.77, 1.9], dtype=torch.float64)
    scale, zero = affine_scale(w.min(), w.max(), 4)
    grid = grid_of(4, "unsigned")
    q = fake_quantize(w, scale, grid=grid, zero_point=zero)
    assert (float(scale), float(zero)) == (pytest.approx(3.2 / 15), 6)
    expected = [-1.28, -0.64, -0.213333, 0, 0.213333, 0.426667, 0.853333, 1.92]
    torch.testing.assert_close(q, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    assert affine_scale(0.5, 2.0, 8)[1] == 0
    assert affine_scale(-2.0, -0.5, 8)[1] == 255


@pytest.mark.parametrize("levels", ["narrow", "full", "even", "unsigned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_nearest_fixed_points_and_as_many_as_codes(bits, levels):
    grid = grid_of(bits, levels)
    x = torch.linspace(-40, 40, 20001, dtype=torch.float64)
    q = fake_quantize(x, 0.3, grid=grid)
    torch.testing.assert_close(fake_quantize(q, 0.3, grid=grid), q)
    found = torch.unique((q / 0.3).mul(2).round())
    expected = (torch.arange(grid.lowest, grid.highest + 1) - grid.zero_point) * 2
    possible = expected[(expected * 0.15 >= -40) & (expected * 0.15 <= 40)]
    assert torch.equal(found, possible.double())
    brute = expected.double()[(x[:, None] - expected * 0.15).abs().argmin(1)] * 0.15
    assert ((x - q).abs() <= (x - brute).abs() + 1e-9).all()


@pytest.mark.chapter("D09", api=API + "fake_quantize")
def test_gradients_to_values_and_step_are_those_of_lsq(golden):
    case = golden("lsq_gradient")
    i, e = case.inputs, case.expected
    w, s = i["w"].requires_grad_(), torch.tensor(i["scale"], dtype=torch.float64, requires_grad=True)
    grid = grid_of(i["bits"], "narrow")
    g = 1 / (w.numel() * grid.highest) ** 0.5
    fake_quantize(w, s, grid=grid, scale_gradient=g).backward(i["grad_out"])
    close(s.grad, e["grad_scale"], case)
    each = [torch.autograd.grad(fake_quantize(w, s, grid=grid)[k], s)[0] for k in range(w.numel())]
    close(torch.stack(each), e["dq_ds"], case)
    close(lsq_initial_scale(w.detach(), grid), e["init_scale"], case)
    masked = torch.where(w.detach().abs() <= grid.highest * i["scale"], i["grad_out"], 0)
    assert torch.equal(w.grad, masked)


@pytest.mark.parametrize("shape", [(), (1,), (5, 1, 1), (5, 3, 1), (3, 7)])
@pytest.mark.parametrize("grid", [grid_of(3), grid_of(2, "even"), grid_of(4, "unsigned")])
def test_gradients_equal_those_of_the_graph_with_detached_rounding(grid, shape):
    torch.manual_seed(1)
    x = torch.randn(5, 3, 7, dtype=torch.float64).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    s = (torch.rand(shape, dtype=torch.float64) + 0.2).requires_grad_()
    zero = torch.tensor(3.0, dtype=torch.float64) if grid.lowest == 0 else grid.zero_point
    out = torch.randn_like(x)
    actual = torch.autograd.grad(fake_quantize(x, s, grid=grid, zero_point=zero), (x, s), out)
    clamped = (x / s + zero).clamp(grid.lowest, grid.highest)
    reference = (clamped + (clamped.round() - clamped).detach() - zero) * s
    for ours, theirs in zip(actual, torch.autograd.grad(reference, (x, s), out), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_half_precision_is_computed_in_float32_and_a_lost_step_comes_back():
    x = torch.linspace(-1, 1, 33).bfloat16()
    q = fake_quantize(x, torch.tensor(0.1), grid=grid_of(4))
    assert q.dtype == torch.bfloat16
    assert torch.equal(q, fake_quantize(x.float(), 0.1, grid=grid_of(4)).bfloat16())
    s = torch.tensor(-0.5, requires_grad=True)
    fake_quantize(torch.tensor([1e4, -1e4]), s, grid=grid_of(2)).sum().backward()
    assert s.grad.isfinite()
    lost, x = torch.tensor([[0.0], [-1.0]], requires_grad=True), torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    fake_quantize(x.requires_grad_(), lost, grid=grid_of(2)).sum().backward()
    assert torch.equal(lost.grad, torch.tensor([[1.0], [-1.0]]))  # outermost levels: both steps count as tiny ones
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))


def test_alternation_keeps_the_step_of_a_row_of_zeros():
    scale, errors = alternate_scale_and_codes(torch.zeros(1, 4), torch.tensor([[0.5]]), grid_of(4), rounds=2)
    assert scale.item() == 0.5
    assert all(error.item() == 0 for error in errors)


@pytest.mark.chapter("D10", api=API + "fake_quantize")
def test_gradient_of_a_weight_that_is_used_both_ways_is_the_sum(golden):
    case = golden("gradient_coupling")
    i = case.inputs
    w = i["w"].requires_grad_()
    q = fake_quantize(w, i["scale"], grid=grid_of(i["bits"], "full"))
    ((w * i["g_task"]).sum() + (q * i["g_Q"]).sum()).backward()
    close(w.grad, case.expected["grad"], case)


@pytest.mark.chapter("D04", api=API + "blend")
def test_blend_is_the_known_numbers_with_its_gradient(golden):
    case = golden("progressive_quant")
    w = case.inputs["w"].requires_grad_()
    for alpha, expected in zip(case.inputs["alpha"].tolist(), case.expected["q"], strict=True):
        q = blend(w, fake_quantize(w, case.inputs["scale"], grid=grid_of(case.inputs["bits"])), alpha)
        close(q.detach(), expected, case)
        (gradient,) = torch.autograd.grad(q.sum(), w)
        assert gradient[0] == 1
        assert gradient[-1] == pytest.approx(1 - alpha)
    with pytest.raises(ValueError, match=r"`alpha` must be in \[0, 1\], got 1.1"):
        blend(w, w, 1.1)


@pytest.mark.chapter("D20", api=API + "binary_quantize")
def test_binary_and_ternary_are_the_known_numbers(golden):
    case = golden("binary_ternary")
    w, e = case.inputs["w"].requires_grad_(), case.expected
    binary, alpha = binary_quantize(w)
    close(binary.detach(), e["binary"], case)
    close(alpha, e["alpha_bin"], case)
    ternary, alpha = ternary_quantize(w)
    close(ternary.detach(), e["ternary"], case)
    close(alpha, e["alpha_ter"], case)
    for quantized in (binary, ternary):
        (gradient,) = torch.autograd.grad(quantized.sum(), w)
        assert gradient.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert binary_quantize(torch.zeros(3))[0].tolist() == [0, 0, 0]
    assert ternary_quantize(torch.zeros(3))[1].tolist() == [0]
    assert binary_quantize(torch.tensor([0.0, 2.0]))[0].tolist() == [1, 1]


def test_ternary_threshold_is_seven_tenths_of_the_mean_magnitude():
    assert ternary_quantize(torch.tensor([1.0, -1.0, 0.60]))[0].tolist() == [1, -1, 0]  # 0.60 < 0.7 * 0.8667
    assert (ternary_quantize(torch.tensor([1.0, -1.0, 0.62]))[0] != 0).all()  # 0.62 > 0.7 * 0.8733


def test_binary_alpha_has_the_least_squared_error():
    w = torch.randn(50, dtype=torch.float64)
    best = (w - binary_quantize(w)[0]).square().sum()
    signs = torch.where(w >= 0, 1.0, -1.0)
    assert all(best <= (w - a * signs).square().sum() for a in torch.linspace(0, 3, 301))


@pytest.mark.chapter("D07", api=API + "alternate_scale_and_codes")
@pytest.mark.chapter("D08", api=API + "alternate_scale_and_codes")
def test_alternation_of_scale_and_codes_is_the_known_numbers_and_never_worse(golden):
    case = golden("alternating_scale_codes")
    w, grid = case.inputs["w"], grid_of(case.inputs["bits"])
    scale, errors = alternate_scale_and_codes(w, minmax_scale(w, grid), grid, rounds=case.inputs["rounds"])
    close(torch.stack(errors), case.expected["mse_after_each_half_step"], case)
    close(scale, case.expected["final_scale"], case)
    many = torch.randn(20, 50, dtype=torch.float64)
    _, errors = alternate_scale_and_codes(many, minmax_scale(many, grid), grid, rounds=8)
    assert (torch.stack(errors).diff(dim=0) <= 1e-15).all()


@pytest.mark.parametrize("levels", ["narrow", "even"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_scale_is_near_the_best_of_a_fine_search(bits, levels):
    w = torch.distributions.Laplace(0.0, 1.0).sample((4, 300)).double()
    grid = grid_of(bits, levels)

    def error(scale):
        return (w - fake_quantize(w, scale, grid=grid)).square().mean(-1, keepdim=True)

    fine = torch.stack([error(minmax_scale(w, grid) * f) for f in torch.linspace(0.02, 1, 2000)]).amin(0)
    assert (error(mse_scale(w, grid)) <= fine * (1.02 if bits < 8 else 1.2)).all()
    assert (error(mse_scale(w, grid)) <= error(minmax_scale(w, grid))).all()
    assert mse_scale(torch.zeros(2, 5), grid).isfinite().all()


def test_mse_range_of_inputs_clips_outliers_and_not_more_than_pays():
    x = torch.cat([torch.randn(5000), torch.tensor([-30.0, 30.0])])
    grid = grid_of(4, "unsigned")

    def error(scale, zero):
        return (x - fake_quantize(x, scale, grid=grid, zero_point=zero)).square().mean()

    assert error(*mse_affine_scale(x, 4)) < 0.4 * error(*affine_scale(x.min(), x.max(), 4))
    assert mse_affine_scale(x.relu(), 8)[1] == 0


@pytest.mark.chapter("D12", api=API + "soft_staircase")
def test_soft_staircase_and_its_slope_are_the_known_numbers(golden):
    case = golden("dsq_learnable_gradient")
    i, e = case.inputs, case.expected
    # the end of a bin belongs to the next one: come from the left
    x = i["x"].clone()
    x[-1] -= 1e-13
    x.requires_grad_()
    q = soft_staircase(x, i["delta"], i["k"], lower=i["lower"])
    (slope,) = torch.autograd.grad(q.sum(), x)
    torch.testing.assert_close(q.detach(), e["q"], rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(slope, e["grad"], rtol=1e-8, atol=1e-11)
    bin_ = ((torch.arange(100000, dtype=torch.float64) + 0.5) / 100000 * i["delta"]).requires_grad_()
    (slope,) = torch.autograd.grad(soft_staircase(bin_, i["delta"], i["k"]).sum(), bin_)
    assert float(slope.mean()) == pytest.approx(e["mean_grad"], abs=1e-8)


@pytest.mark.parametrize("grid", [grid_of(3), grid_of(2, "even")])
def test_dsq_rounds_hard_and_learns_its_sharpness(grid):
    x = torch.randn(200, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    k = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    q = dsq_fake_quantize(x, s, k, grid=grid)
    torch.testing.assert_close(q, fake_quantize(x, s, grid=grid))
    to_x, to_s, to_k = torch.autograd.grad((q * torch.randn_like(q)).sum(), (x, s, k))
    assert to_s != 0
    assert to_k != 0
    outside = (x.abs() > (grid.highest - grid.zero_point) * 0.4).detach()
    assert outside.any()
    assert (to_x[outside] == 0).all()
    # nearly straight through where the staircase is nearly a line
    (to_x,) = torch.autograd.grad(dsq_fake_quantize(x, s, torch.tensor(1e-3), grid=grid).sum(), x)
    torch.testing.assert_close(to_x, (~outside).double(), rtol=1e-5, atol=0)


def test_levels_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="`levels` must be 'narrow', 'full', 'even' or 'unsigned', got 'odd'"):
        grid_of(4, "odd")
    with pytest.raises(ValueError, match="`bits` must be from 2 to 16 for 'narrow' levels, got 1"):
        grid_of(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", ["narrow", "full", "even", "unsigned"])
@pytest.mark.parametrize("bits", [2, 8])
def test_the_outermost_levels_get_gradients_and_what_lies_beyond_does_not(bits, levels, dtype):
    grid = grid_of(bits, levels)
    ends = torch.tensor([grid.lowest, grid.highest], dtype=dtype) - grid.zero_point
    beyond = ends + torch.tensor([-1e-3, 1e-3], dtype=dtype)
    values = torch.cat([ends, beyond]).requires_grad_()
    fake_quantize(values, torch.tensor(1.0, dtype=dtype), grid=grid).sum().backward()
    assert values.grad.tolist() == [1, 1, 0, 0]


def test_second_derivatives_are_refused_with_a_way_out():
    model, x = prepare(nn.Sequential(nn.Linear(4, 3)), QuantSpec(4)), torch.randn(5, 4)

    def curvature():
        (slope,) = torch.autograd.grad(model(x).square().sum(), model[0].weight, create_graph=True)
        return torch.autograd.grad(slope.sum(), model[0].weight)[0]

    with pytest.raises(RuntimeError, match=r"Rounding has no second derivatives.*`with full_precision\(model\)"):
        curvature()
    with full_precision(model):
        torch.testing.assert_close(curvature(), (2 * x.T @ x).sum(0).expand(3, 4))
