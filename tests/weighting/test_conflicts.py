"""PCGrad and CAGrad as weights, against their papers' algorithms on the gradients themselves."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_distill.weighting import cagrad_weights, mgda_weights, pcgrad_weights


def gradients(tasks, parameters, seed):
    return torch.randn(tasks, parameters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pcgrad_on_vectors(g):
    total = torch.zeros_like(g[0])
    for i in range(len(g)):
        own = g[i].clone()
        for j in range(len(g)):
            if j != i and own @ g[j] < 0:
                own -= (own @ g[j]) / (g[j] @ g[j]) * g[j]
        total += own
    return total


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_pcgrad_projects_the_gradients(tasks):
    for seed in range(10):
        g = gradients(tasks, 6, seed)
        torch.testing.assert_close(pcgrad_weights(g @ g.T) @ g, pcgrad_on_vectors(g))
    together = torch.eye(tasks) + 0.1
    assert pcgrad_weights(together).tolist() == [1.0] * tasks


@pytest.mark.parametrize("c", [0.2, 0.4, 0.9])
@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_cagrad_helps_the_worst_off_as_much_as_the_ball_allows(tasks, c):
    for seed in range(5):
        g = gradients(tasks, 6, seed) * torch.logspace(0, 1, tasks, dtype=torch.float64)[:, None]
        mean = g.mean(dim=0)
        direction = cagrad_weights(g @ g.T, c=c) @ g
        assert (direction - mean).norm().item() == pytest.approx(c * mean.norm().item(), rel=1e-6)
        reached = (g @ direction).min().item()
        # the paper's problem: max over d of min_i <g_i, d> with |d - g_0| <= c |g_0|
        array, radius = g.numpy(), c * mean.norm().item()
        found = minimize(
            lambda v: -v[-1],
            np.append(mean.numpy(), (array @ mean.numpy()).min()),
            constraints=[
                {"type": "ineq", "fun": lambda v, array=array: array @ v[:-1] - v[-1]},
                {"type": "ineq", "fun": lambda v, m=mean, r=radius: r**2 - ((v[:-1] - m.numpy()) ** 2).sum()},
            ],
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert reached == pytest.approx(found.x[-1], rel=1e-4, abs=1e-5)


def test_cagrad_at_the_ends_of_its_range():
    g = gradients(3, 6, 0)
    assert cagrad_weights(g @ g.T, c=0.0).tolist() == pytest.approx([1 / 3] * 3)
    far = cagrad_weights(g @ g.T, c=1e6)
    torch.testing.assert_close(far / far.sum(), mgda_weights(g @ g.T), rtol=1e-3, atol=1e-3)
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert cagrad_weights(opposite).tolist() == [0.5, 0.5]  # the mean gradient is 0
    with pytest.raises(ValueError, match="`c` must not be negative, got -1"):
        cagrad_weights(torch.eye(2), c=-1)
