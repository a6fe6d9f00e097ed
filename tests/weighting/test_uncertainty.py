"""Uncertainty weighting: golden numbers, its minimum, projection, precision."""

import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from lightning_distill.weighting import UncertaintyWeights, uncertainty_weighted

API = "lightning_distill.weighting."


def bound(**arguments):
    weighting = UncertaintyWeights(**arguments)
    weighting.bind(["hard", "soft"], nn.Identity())
    return weighting


@pytest.mark.chapter("A58", api=API + "uncertainty_weighted")
def test_golden(golden):
    case = golden("uncertainty_weighting")
    log_sigma = case.inputs["log_sigma"].requires_grad_()
    total = uncertainty_weighted(case.inputs["losses"], 2 * log_sigma)
    assert total.item() == pytest.approx(case.expected["total"], rel=case.rtol)
    (slope,) = torch.autograd.grad(total, log_sigma)
    torch.testing.assert_close(slope, case.expected["grad_log_sigma"], rtol=case.rtol, atol=case.atol)
    sigma = log_sigma.detach().exp().requires_grad_()
    (slope,) = torch.autograd.grad(uncertainty_weighted(case.inputs["losses"], (sigma**2).log()), sigma)
    torch.testing.assert_close(slope, case.expected["grad_sigma"], rtol=case.rtol, atol=case.atol)
    at_minimum = uncertainty_weighted(case.inputs["losses"], case.expected["stationary_sigma2"].log())
    assert at_minimum.item() == pytest.approx(case.expected["minimum"], rel=case.rtol)


@pytest.mark.chapter("A58", api=API + "uncertainty_weighted")
def test_minimum_is_where_the_variance_is_the_loss():
    losses = torch.tensor([0.02, 1.0, 7.0], dtype=torch.float64)
    found = minimize(lambda s: uncertainty_weighted(losses, torch.from_numpy(s)).item(), [0.0] * 3, tol=1e-12)
    torch.testing.assert_close(torch.from_numpy(found.x), losses.log(), rtol=0, atol=1e-4)


@pytest.mark.chapter("A58", api=API + "UncertaintyWeights")
@pytest.mark.parametrize("losses", [(0.7, 3.0), (1e-3, 50.0)])
def test_training_finds_it(losses):
    weighting = bound()
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.1)
    values = dict(zip(("hard", "soft"), map(torch.tensor, losses), strict=True))
    for _ in range(1500):
        optimizer.zero_grad()
        weighting(values).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variances.exp(), torch.tensor(losses), rtol=1e-3, atol=0)
    assert weighting.weights() == pytest.approx({"hard": 0.5 / losses[0], "soft": 0.5 / losses[1]}, rel=1e-3)


def test_log_variances_leave_the_edge_again():
    weighting = bound()
    optimizer = torch.optim.SGD(weighting.parameters(), lr=1.0)
    tiny, large = {"hard": torch.tensor(0.0), "soft": torch.tensor(1.0)}, torch.tensor(1.0)
    for _ in range(40):  # a loss of 0 has no best variance
        optimizer.zero_grad()
        weighting(tiny).backward()
        optimizer.step()
    weighting(tiny)
    assert weighting.log_variances[0].item() == -10.0
    weighting({"hard": large, "soft": large}).backward()
    assert weighting.log_variances.grad[0] < -1e3  # a clamp without projection would have none


def test_terms_may_be_absent_but_not_unknown():
    weighting = bound(log_variance={"soft": 1.0})
    both = weighting({"hard": torch.tensor(2.0), "soft": torch.tensor(3.0)})
    alone = weighting({"soft": torch.tensor(3.0)})
    assert both.item() == pytest.approx(0.5 * (2 + 3 * torch.e**-1 + 1))
    assert alone.item() == pytest.approx(0.5 * (3 * torch.e**-1 + 1))
    with pytest.raises(ValueError, match=r"variances for \['hard', 'soft'\], but there are losses of \['late'\]"):
        weighting({"late": torch.tensor(1.0)})
    named = UncertaintyWeights(["hard", "soft", "late"])
    named.bind(["hard", "soft"], nn.Identity())
    assert named({"late": torch.tensor(1.0)}).item() == pytest.approx(0.5)


def test_state_stays_in_float32():
    weighting = bound().to(torch.bfloat16)
    assert weighting.log_variances.dtype == torch.float32
    total = weighting({name: torch.tensor(1.0, dtype=torch.bfloat16) for name in ("hard", "soft")})
    assert total.dtype == torch.float32


def test_autocast_does_not_round_the_objective():
    losses, s = torch.tensor([1.2345, 7.6543]), torch.tensor([0.1234, -0.4321])
    with torch.autocast("cpu", torch.bfloat16):
        total = uncertainty_weighted(losses, s)
    assert torch.equal(total, uncertainty_weighted(losses, s))


def test_rejects_bad_values():
    with pytest.raises(ValueError, match=r"`log_variance` must be in \[-10, 10\], got 11"):
        UncertaintyWeights(log_variance=11)
    with pytest.raises(ValueError, match=r"`log_variance` names \['sotf'\], which are no terms"):
        bound(log_variance={"sotf": 1.0})
    with pytest.raises(ValueError, match="`learning_rate` must be positive, got 0"):
        UncertaintyWeights(learning_rate=0)
    with pytest.raises(ValueError, match=r"balances two terms or more, but the module has only \['kd'\]"):
        UncertaintyWeights().bind(["kd"], nn.Identity())
    with pytest.raises(ValueError, match=r"the module also has \['soft'\]"):
        UncertaintyWeights(["hard", "other"]).bind(["hard", "soft"], nn.Identity())
    with pytest.raises(ValueError, match=r"losses that are not negative, got \{'soft': -1.0\}"):
        bound()({"hard": torch.tensor(1.0), "soft": torch.tensor(-1.0)})
