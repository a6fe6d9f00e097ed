"""GradNorm's formulas: golden numbers, autograd of the paper's loss, and where they rest."""

import pytest
import torch

from lightning_distill.weighting import gradnorm_step, gradnorm_weights, training_rates

API = "lightning_distill.weighting."


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.chapter("A59", api=API + "gradnorm_weights")
def test_closed_form_is_the_golden_one(golden):
    case = golden("gradnorm_closed_form")
    rates = training_rates(case.inputs["loss"], case.inputs["loss0"])
    torch.testing.assert_close(rates, case.expected["relative_inverse_rate"], rtol=case.rtol, atol=case.atol)
    norms = case.inputs["grad_norms"]
    weights = gradnorm_weights(norms, rates, alpha=case.inputs["alpha"])
    torch.testing.assert_close(weights, case.expected["weights"], rtol=case.rtol, atol=case.atol)
    weighted = weights * norms
    assert (weighted[0] / weighted[1]).item() == pytest.approx(case.expected["weighted_grad_norm_ratio"])


@pytest.mark.chapter("A59", api=API + "gradnorm_step")
def test_step_is_that_of_the_paper(golden):
    case = golden("gradnorm_closed_form")  # the same situation; the step's numbers are computed here by autograd
    norms, rates = case.inputs["grad_norms"], case.expected["relative_inverse_rate"]
    weights = double(1.0, 1.0).requires_grad_()
    target = ((weights * norms).mean() * rates ** case.inputs["alpha"]).detach()
    (slope,) = torch.autograd.grad((weights * norms - target).abs().sum(), weights)
    assert slope.tolist() == [10.0, -1.0]
    moved = weights.detach() - 0.025 * slope
    expected = moved * 2 / moved.sum()
    assert expected.tolist() == pytest.approx([0.84507, 1.15493], abs=1e-5)  # as the chapter's review has it
    found = gradnorm_step(weights.detach(), norms, rates, alpha=case.inputs["alpha"], lr=0.025)
    torch.testing.assert_close(found, expected)


@pytest.mark.chapter("A59", api=API + "gradnorm_step")
@pytest.mark.parametrize("alpha", [0.0, 1.0])  # otherwise the targets do not add up to the norms, and it rests nearby
def test_steps_come_to_rest_at_the_closed_form(alpha):
    norms, rates = double(2.0, 1.0, 0.5), double(0.8, 1.3, 0.9)
    weights = double(1.0, 1.0, 1.0)
    for step in range(3000):
        weights = gradnorm_step(weights, norms, rates, alpha=alpha, lr=0.02 / (1 + step / 50))
        assert weights.sum().item() == pytest.approx(3)
        assert (weights > 0).all()
    torch.testing.assert_close(weights, gradnorm_weights(norms, rates, alpha=alpha), rtol=0.01, atol=0.0)
    if alpha == 0:
        weighted = weights * norms
        assert (weighted.max() / weighted.min()).item() < 1.04


@pytest.mark.erratum("ERR-22")
def test_printed_update_has_both_ratios_inverted(golden):
    case = golden("gradnorm_as_written")
    norms, first, loss = (case.inputs[name] for name in ("grad_norms", "loss0", "loss"))
    alpha = case.inputs["alpha"]

    def printed(weights, norms):
        rate = first / loss
        return weights * ((norms / norms.mean()) * (rate / rate.mean())) ** alpha

    torch.testing.assert_close(
        printed(case.inputs["weights"], norms), case.expected["weights"], rtol=case.rtol, atol=case.atol
    )
    weights = case.inputs["weights"]
    for _ in range(5):
        weights = printed(weights, norms)
    runaway = weights * norms
    assert (runaway[0] / runaway[1]).item() > 1e4  # the larger and faster task has won
    ours = gradnorm_weights(norms, training_rates(loss, first), alpha=alpha) * norms
    assert (ours[0] / ours[1]).item() == pytest.approx(0.745, abs=1e-3)


def test_step_never_takes_a_weight_to_zero_or_below():
    weights = gradnorm_step(double(1.0, 1.0), double(100.0, 1.0), double(1.0, 1.0), lr=1.0)
    assert 0 < weights[0] < 2e-3 * weights[1]
    assert weights.sum().item() == pytest.approx(2)


def test_rejects_losses_that_cannot_be_compared():
    for losses, first in [([-1.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 1.0]), ([float("nan"), 1.0], [1.0, 1.0])]:
        with pytest.raises(ValueError, match="losses must not be negative and first losses must be positive"):
            training_rates(double(*losses), double(*first))
