"""Importance of layers and fit of pairs, against NumPy, autograd and invariants."""

import itertools

import numpy as np
import pytest
import torch

from lightning_distill.layer_maps import (
    cka_similarity,
    fitted_cost,
    gradient_importance,
    knowledge_density,
    taylor_importance,
)


@pytest.mark.chapter("B36", api="lightning_distill.layer_maps.taylor_importance")
def test_taylor_golden(golden):
    case = golden("taylor_importance")
    gradient, hidden = case.inputs["grad"], case.inputs["h"]
    for mode, name in {"abs_sample": "abs_per_sample_mean", "abs_element": "abs_elementwise_sum"}.items():
        found = taylor_importance(gradient, hidden, mode=mode)
        assert found.item() == pytest.approx(float(case.expected[name]), rel=case.rtol)
    signed = taylor_importance(gradient, hidden, mode="signed")
    assert signed.item() * 2 == pytest.approx(float(case.expected["signed_sum"]), rel=case.rtol)  # a sum over 2 samples


@pytest.mark.chapter("C12", api="lightning_distill.layer_maps.taylor_importance")
@pytest.mark.erratum("ERR-44")
def test_signed_importance_cancels_over_samples_and_the_absolute_one_does_not():
    hidden = torch.randn(8, 5, dtype=torch.float64)
    gradient = torch.randn(8, 5, dtype=torch.float64)
    both = torch.cat([hidden, -hidden]), torch.cat([gradient, gradient])
    assert float(taylor_importance(both[1], both[0], mode="signed")) == pytest.approx(0.0, abs=1e-15)
    alone = taylor_importance(gradient, hidden)
    torch.testing.assert_close(taylor_importance(both[1], both[0]), alone)
    assert alone > 0.1
    assert alone >= taylor_importance(gradient, hidden, mode="signed").abs()


def test_taylor_estimates_what_leaving_the_layer_out_changes():
    """For a loss that is linear in the layer the first order is exact."""
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64)
    per_sample = (weight * hidden).sum(dim=1)
    (gradient,) = torch.autograd.grad(per_sample.sum(), hidden)
    torch.testing.assert_close(taylor_importance(gradient, hidden.detach()), per_sample.detach().abs().mean())
    torch.testing.assert_close(
        taylor_importance(3 * gradient, hidden.detach()), 3 * taylor_importance(gradient, hidden.detach())
    )


@pytest.mark.chapter("B37", api="lightning_distill.layer_maps.knowledge_density")
def test_density_golden(golden):
    case = golden("knowledge_density")
    found = knowledge_density(list(case.inputs["hidden_LBD"]))
    torch.testing.assert_close(found, case.expected["I"], rtol=case.rtol, atol=case.atol)


def test_density_ignores_padding_and_the_relative_one_ignores_scale():
    hidden = [torch.randn(2, 4, 3, dtype=torch.float64) for _ in range(3)]
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    expected = [np.linalg.norm((b - a)[mask].numpy(), axis=-1).mean() for a, b in itertools.pairwise(hidden)]
    np.testing.assert_allclose(knowledge_density(hidden, mask=mask), expected, rtol=1e-12)
    spoilt = [torch.where(mask.unsqueeze(-1), state, 1e6) for state in hidden]
    torch.testing.assert_close(knowledge_density(spoilt, mask=mask), knowledge_density(hidden, mask=mask))
    scaled = [100 * state for state in hidden]
    torch.testing.assert_close(knowledge_density(scaled, relative=True), knowledge_density(hidden, relative=True))
    torch.testing.assert_close(knowledge_density(scaled), 100 * knowledge_density(hidden))
    assert knowledge_density([hidden[0], hidden[0]]).item() == 0


def test_half_precision_is_computed_in_float32():
    hidden = [torch.full((2, 3), 300.0, dtype=torch.float16), torch.full((2, 3), -300.0, dtype=torch.float16)]
    assert knowledge_density(hidden).item() == pytest.approx(600 * 3**0.5)
    assert taylor_importance(hidden[0], hidden[0]).item() == pytest.approx(3 * 300.0**2)


@pytest.mark.chapter("A40", api="lightning_distill.layer_maps.gradient_importance")
def test_gradient_importance_golden(golden):
    case = golden("gradient_layer_importance")
    gradient = case.inputs["grad_BD"]
    feature = torch.zeros_like(gradient, requires_grad=True)
    loss = (gradient * feature).sum()
    found = gradient_importance(loss, [feature])
    assert found.item() == pytest.approx(float(case.expected["norm_full"]), rel=case.rtol)
    assert not found.requires_grad
    torch.testing.assert_close(gradient_importance(2 * loss, [feature]), 2 * found)
    per_element = gradient_importance(loss, [feature], per_element=True)
    torch.testing.assert_close(per_element, found / gradient.numel() ** 0.5)
    loss.backward()  # the graph is still there
    torch.testing.assert_close(feature.grad, gradient)


def test_a_feature_that_the_loss_does_not_see_has_no_importance():
    seen, unseen, frozen = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(3)
    loss = (seen * frozen).sum()
    assert gradient_importance(loss, [seen, unseen, frozen]).tolist() == pytest.approx([3**0.5, 0.0, 0.0])


def test_fitted_cost_equals_ridge_regression_in_numpy():
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(40, 5, generator=generator, dtype=torch.float64) + 3 for _ in range(2)]
    teacher = [torch.randn(40, width, generator=generator, dtype=torch.float64) - 2 for width in (3, 4, 6)]
    teacher[1] = student[0][:, :4] * 2 + 1
    found = fitted_cost(student, teacher, ridge=0.1)
    for i, x in enumerate(student):
        for j, y in enumerate(teacher):
            x_fit, y_fit, x_test, y_test = x[::2].numpy(), y[::2].numpy(), x[1::2].numpy(), y[1::2].numpy()
            centred = x_fit - x_fit.mean(0)
            gram = centred.T @ centred
            weight = np.linalg.inv(gram + 0.1 * np.trace(gram) / 5 * np.eye(5)) @ centred.T @ (y_fit - y_fit.mean(0))
            predicted = (x_test - x_fit.mean(0)) @ weight + y_fit.mean(0)
            expected = ((predicted - y_test) ** 2).sum() / ((y_test - y_test.mean(0)) ** 2).sum()
            assert found[i, j].item() == pytest.approx(expected, rel=1e-9)
    assert found[0, 1] < 0.05
    assert found[1].min() > 0.8


def test_cka_of_equal_geometry_is_one_and_of_noise_about_zero():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    torch.testing.assert_close(cka_similarity([x], [-3 * x @ rotation + 5]), torch.ones(1, 1, dtype=torch.float64))
    wide = [torch.randn(64, 384, generator=generator) for _ in range(6)]
    found = cka_similarity(wide[:3], wide[3:])
    assert found.abs().max() < 0.1  # the biased estimate gives about 0.86 here


def test_cka_equals_the_unbiased_hsic_formula():
    """Song et al. (2012), eq. 5, written out."""
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)

    def hsic(a, b):
        k, m = (g - np.diag(np.diag(g)) for g in (a @ a.T, b @ b.T))
        n, one = len(k), np.ones(len(k))
        trace = np.trace(k @ m)
        sums = one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return (trace + sums - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    a, b = x.numpy(), y.numpy()
    expected = hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b))
    assert cka_similarity([x], [y]).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: taylor_importance(torch.ones(2), torch.ones(3)), "must have the same shape"),
        (lambda: taylor_importance(torch.ones(2, 1), torch.ones(2, 1), mode="abs"), "`mode` must be 'abs_sample'"),
        (lambda: knowledge_density([torch.ones(2, 3)]), "at least two tensors of one shape"),
        (lambda: knowledge_density([torch.ones(2, 3), torch.ones(2, 4)]), "at least two tensors of one shape"),
        (lambda: knowledge_density([torch.ones(2, 3)] * 2, mask=torch.zeros(2, dtype=torch.bool)), "leaves no"),
        (lambda: fitted_cost([torch.ones(3, 2)], [torch.ones(3, 2)]), "at least 4 rows, got 3"),
        (lambda: fitted_cost([torch.ones(8, 2)], [torch.ones(7, 2)]), "with the same n, got"),
        (lambda: fitted_cost([torch.ones(8, 2)], [torch.ones(8, 2)], ridge=0.0), "`ridge` must be positive"),
        (lambda: cka_similarity([torch.ones(8, 2)], [torch.randn(8, 2)]), "same features for every row"),
        (lambda: cka_similarity([torch.ones(3, 2)], [torch.ones(3, 2)]), "at least 4 rows, got 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
