"""MGDA: the shortest convex combination of gradients, against SciPy's quadratic programming."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_distill.weighting import mgda_weights

API = "lightning_distill.weighting.mgda_weights"


def gram(gradients):
    return gradients @ gradients.T


def by_slsqp(gradients):
    """The primal problem: min |d|^2 / 2 + e with <g_i, d> <= e."""
    g = gradients.numpy()
    start = np.append(-g.mean(axis=0), 0.0)
    found = minimize(
        lambda v: v[:-1] @ v[:-1] / 2 + v[-1],
        start,
        jac=lambda v: np.append(v[:-1], 1.0),
        constraints={"type": "ineq", "fun": lambda v: v[-1] - g @ v[:-1], "jac": lambda v: np.c_[-g, np.ones(len(g))]},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return found.x[:-1], found.x[-1]


@pytest.mark.chapter("A57", api=API)
@pytest.mark.parametrize("name", ["mgda_two_tasks", "mgda_three_tasks", "mgda_dominated"])
def test_golden(golden, name):
    case = golden(name)
    gradients = case.inputs["grads"]
    weights = mgda_weights(gram(gradients))
    torch.testing.assert_close(weights, case.expected["weights"], rtol=case.rtol, atol=case.atol)
    direction = -weights @ gradients
    torch.testing.assert_close(direction, case.expected["direction"], rtol=case.rtol, atol=case.atol)
    assert (gradients @ direction).max().item() == pytest.approx(case.expected["epsilon"], rel=1e-6)
    if name == "mgda_dominated":
        assert weights.tolist() == [1.0, 0.0]  # exactly at the boundary


@pytest.mark.chapter("A57", api=API)
@pytest.mark.parametrize(("tasks", "parameters"), [(2, 3), (3, 5), (5, 20), (8, 4), (12, 40)])
def test_direction_lowers_every_loss_and_is_that_of_the_primal_problem(tasks, parameters):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        gradients = torch.randn(tasks, parameters, generator=generator, dtype=torch.float64)
        gradients *= torch.logspace(0, -2, tasks, dtype=torch.float64)[:, None]  # very unlike lengths
        gradients[:, 0] += seed % 3  # from conflicting to agreeing
        weights = mgda_weights(gram(gradients))
        assert (weights >= 0).all()
        assert weights.sum().item() == pytest.approx(1)
        direction = -weights @ gradients
        length = direction @ direction
        slopes = gradients @ direction
        assert (slopes <= -length + 1e-9).all()
        torch.testing.assert_close(slopes[weights > 0], -length.expand(int((weights > 0).sum())), rtol=1e-6, atol=1e-9)
        primal, epsilon = by_slsqp(gradients)
        torch.testing.assert_close(direction, torch.from_numpy(primal), rtol=1e-3, atol=1e-4)
        assert epsilon == pytest.approx(-length.item(), rel=1e-3, abs=1e-6)


@pytest.mark.chapter("A57", api=API)
def test_pareto_stationary_points_have_no_direction():
    gradients = torch.tensor([[1.0, 2.0], [-2.0, -4.0]], dtype=torch.float64)
    weights = mgda_weights(gram(gradients))
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    assert (weights @ gradients).norm() < 1e-9
    triangle = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8], [3.0, 1.0]], dtype=torch.float64)  # 0 is inside
    assert (mgda_weights(gram(triangle)) @ triangle).norm() < 1e-6


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_degenerate_gradients(tasks):
    ones = torch.ones(tasks, 4, dtype=torch.float64)
    weights = mgda_weights(gram(ones))  # all the same: any weights do
    assert (weights >= 0).all()
    torch.testing.assert_close(weights @ ones, ones[0])
    assert mgda_weights(torch.zeros(tasks, tasks)).tolist() == pytest.approx([1 / tasks] * tasks)
    huge, tiny = (mgda_weights(gram(torch.eye(tasks) * scale)) for scale in (1e8, 1e-8))
    torch.testing.assert_close(huge, tiny)


def test_one_gradient_and_bad_input():
    assert mgda_weights(torch.tensor([[2.0]])).tolist() == [1.0]
    with pytest.raises(ValueError, match=r"`gram` must be a square matrix of inner products, got the shape \(2, 3\)"):
        mgda_weights(torch.ones(2, 3))
    with pytest.raises(ValueError, match="`gram` must be finite, got"):
        mgda_weights(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
