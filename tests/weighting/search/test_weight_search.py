"""Searches for weights: hypergradient, bilevel descent, REINFORCE and evolution, on a problem that is known exactly."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_distill.weighting.search import (
    WeightSearch,
    bilevel_search,
    conjugate_gradients,
    evolution_search,
    expected_reward_gradient,
    implicit_hypergradient,
    neumann_series,
    recombination_weights,
    reinforce_gradient,
    reinforce_search,
)

ROOM = "lightning_distill.weighting.search"


class Quadratic:
    """Two quadratic losses, of which the second has the weight; what trains best is known in closed form."""

    def __init__(self, inputs):
        self.first, self.second = inputs["H1"], inputs["H2"]
        self.a, self.b, self.target = inputs["a"], inputs["b"], inputs["val_target"]
        self.trainings = 0

    def train(self, weights):
        self.trainings += 1
        lam = weights["kd"]
        right = self.first @ self.a + lam * self.second @ self.b
        return [torch.linalg.solve(self.first + lam * self.second, right)]

    def train_loss(self, parameters, weights):
        x, y = parameters[0] - self.a, parameters[0] - self.b
        return x @ self.first @ x / 2 + weights["kd"] * (y @ self.second @ y) / 2

    def validation_loss(self, parameters):
        return (parameters[0] - self.target).square().sum() / 2

    def objective(self, weights):
        return self.validation_loss(self.train(weights)).item()


def hypergradient(problem, lam, **arguments):
    weight = torch.tensor(lam, dtype=torch.float64, requires_grad=True)
    parameters = [p.requires_grad_() for p in problem.train({"kd": lam})]
    return implicit_hypergradient(
        problem.train_loss(parameters, {"kd": weight}), problem.validation_loss(parameters), parameters, weight,
        **arguments,
    ).item()  # fmt: skip


@pytest.mark.chapter("A66", api=f"{ROOM}.implicit_hypergradient")
@pytest.mark.parametrize(
    "arguments", [{}, {"solver": "neumann", "iterations": 400, "step_size": 0.4}], ids=["cg", "neumann"]
)
def test_hypergradient_matches_golden_and_finite_differences(golden, arguments):
    case = golden("bilevel_implicit_gradient")
    problem, lam = Quadratic(case.inputs), case.inputs["lam"]
    (theta,) = problem.train({"kd": lam})
    torch.testing.assert_close(theta, case.expected["theta"], rtol=case.rtol, atol=case.atol)
    assert problem.objective({"kd": lam}) == pytest.approx(case.expected["val_loss"], rel=case.rtol)
    found = hypergradient(problem, lam, **arguments)
    assert found == pytest.approx(case.expected["hypergradient"], rel=1e-8)
    h = 1e-5
    difference = (problem.objective({"kd": lam + h}) - problem.objective({"kd": lam - h})) / (2 * h)
    assert found == pytest.approx(difference, rel=1e-6)


def test_hypergradient_of_a_network_matches_finite_differences_and_adds_the_direct_part():
    """Several weights, several parameters of any shape, a loss that is not quadratic, and weights in the outer loss."""
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randint(0, 2, (30,))
    soft = torch.softmax(torch.randn(30, 2, dtype=torch.float64), -1)

    def inner(parameters, weights):
        logits = x @ parameters[0] + parameters[1]
        kd = -(soft * logits.log_softmax(-1)).sum(-1).mean()
        ridge = sum(p.square().sum() for p in parameters)
        return weights[0] * nn.functional.cross_entropy(logits, y) + weights[1] * kd + 0.1 * ridge

    def outer(parameters, weights):
        return (x[:10] @ parameters[0]).sin().mean() + 0.3 * weights[0] ** 2

    def trained(weights):
        parameters = [torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)]
        parameters.append(torch.zeros(2, dtype=torch.float64, requires_grad=True))
        optimizer = torch.optim.LBFGS(
            parameters, lr=1.0, max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure():
            optimizer.zero_grad()
            loss = inner(parameters, weights)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return parameters

    weights = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    parameters = trained(weights.detach())
    found = implicit_hypergradient(inner(parameters, weights), outer(parameters, weights), parameters, weights)
    for i in range(2):
        h = torch.zeros(2, dtype=torch.float64)
        h[i] = 1e-4
        ends = [outer(trained(weights.detach() + s * h), weights.detach() + s * h).item() for s in (1, -1)]
        assert found[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-4)


def test_solvers_match_a_direct_solution_and_cg_stops_at_negative_curvature():
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    matrix, right = square @ square.T + torch.eye(6), torch.randn(6, dtype=torch.float64, generator=generator)
    expected = torch.linalg.solve(matrix, right)
    torch.testing.assert_close(conjugate_gradients(lambda v: matrix @ v, right, 6), expected, rtol=1e-8, atol=1e-8)
    step = 1 / torch.linalg.eigvalsh(matrix).max().item()
    torch.testing.assert_close(neumann_series(lambda v: matrix @ v, right, 600, step), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(conjugate_gradients(lambda v: -v, right, 6), torch.zeros(6, dtype=torch.float64))
    assert torch.equal(conjugate_gradients(lambda v: v, torch.zeros(3), 6), torch.zeros(3))


def test_damping_is_added_to_the_diagonal(golden):
    case = golden("bilevel_implicit_gradient")
    problem, lam = Quadratic(case.inputs), case.inputs["lam"]
    (theta,) = problem.train({"kd": lam})
    hessian = problem.first + lam * problem.second + 0.5 * torch.eye(2)
    mixed = problem.second @ (theta - problem.b)
    expected = -(theta - problem.target) @ torch.linalg.solve(hessian, mixed)
    assert hypergradient(problem, lam, damping=0.5) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.chapter("A65", api=f"{ROOM}.bilevel_search")
def test_every_search_finds_the_weight_that_validates_best(golden):
    case = golden("bilevel_optimum")
    best, lowest = case.expected["lam_star"], case.expected["val_loss_star"]
    problem = Quadratic(case.inputs)
    found = bilevel_search(
        problem.train, problem.train_loss, problem.validation_loss, {"kd": 0.3}, budget=60, lr=0.1, damping=0.0
    )
    assert problem.trainings <= 60
    assert found.best["kd"] == pytest.approx(best, rel=1e-3)
    assert found.value == pytest.approx(lowest, rel=1e-5)
    evolved = evolution_search(problem.objective, {"kd": 0.3}, generations=40, seed=1)
    assert evolved.best["kd"] == pytest.approx(best, abs=2e-2)
    choices = [round(0.1 * 1.3**i, 4) for i in range(14)]
    nearest = min(choices, key=lambda lam: problem.objective({"kd": lam}))
    drawn = reinforce_search(problem.objective, {"kd": choices}, budget=150, lr=0.3)
    assert drawn.best["kd"] == nearest
    assert drawn.preferred["kd"] == pytest.approx(best, rel=0.5)


@pytest.mark.chapter("A67", api=f"{ROOM}.reinforce_search")
def test_expected_gradient_matches_golden_and_autograd_and_samples_estimate_it(golden):
    case = golden("reinforce_exact_gradient")
    logits, rewards = case.inputs["logits"], case.inputs["rewards"]
    exact = expected_reward_gradient(logits, rewards)
    torch.testing.assert_close(exact, case.expected["gradient"], rtol=case.rtol, atol=case.atol)
    leaf = logits.clone().requires_grad_()
    leaf.softmax(0).dot(rewards).backward()
    torch.testing.assert_close(leaf.grad, exact)
    policy = logits.softmax(0)
    for baseline in (0.0, 0.7, -5.0):  # the mean over all actions, weighted by the policy, is exact for every baseline
        parts = [reinforce_gradient(logits, torch.tensor([a]), rewards[a : a + 1], baseline=baseline) for a in range(3)]
        torch.testing.assert_close(sum(p * part for p, part in zip(policy, parts, strict=True)), exact)
    actions = torch.multinomial(policy, 20_000, replacement=True)
    estimate = reinforce_gradient(logits, actions, rewards[actions], baseline=0.677)
    torch.testing.assert_close(estimate, exact, atol=6e-3, rtol=0)


@pytest.mark.chapter("A68", api=f"{ROOM}.evolution_search")
def test_recombination_weights_match_golden(golden):
    case = golden("evolution_recombination_weights")
    weights, effective = recombination_weights(int(case.inputs["mu"]))
    torch.testing.assert_close(weights, case.expected["weights"], rtol=case.rtol, atol=case.atol)
    assert effective == pytest.approx(case.expected["mu_eff"], rel=case.rtol)
    assert recombination_weights(1)[0].tolist() == [1.0]


def test_evolution_is_monotone_deterministic_and_sees_only_the_order():
    def objective(weights):
        return (math.log(weights["a"]) - 1) ** 2 + 10 * (math.log(weights["b"]) + 2) ** 2

    first = evolution_search(objective, {"a": 1.0, "b": 1.0}, generations=30, seed=3)
    again = evolution_search(objective, {"a": 1.0, "b": 1.0}, generations=30, seed=3)
    other = evolution_search(lambda w: math.exp(objective(w)) - 7, {"a": 1.0, "b": 1.0}, generations=30, seed=3)
    assert first.tried == again.tried
    assert [weights for weights, _ in other.tried] == [weights for weights, _ in first.tried]
    assert len(first.tried) == 240
    assert first.best_so_far == sorted(first.best_so_far, reverse=True)
    assert first.best == pytest.approx({"a": math.e, "b": math.exp(-2)}, rel=0.05)
    assert evolution_search(objective, {"a": 1.0, "b": 1.0}, generations=1, seed=4).tried != first.tried[:8]


def test_evolution_widens_its_step_on_a_slope_and_narrows_it_at_an_optimum():
    slope = evolution_search(lambda w: -w["a"], {"a": 1.0}, generations=6, sigma=0.1)
    assert np.std([math.log(weights["a"]) for weights, _ in slope.tried[-8:]]) > 0.3
    flat = evolution_search(lambda w: math.log(w["a"]) ** 2, {"a": 1.0}, generations=40, sigma=1.0)
    assert np.std([math.log(weights["a"]) for weights, _ in flat.tried[-8:]]) < 0.05


def test_trainings_that_diverge_are_noted_and_avoided():
    result = evolution_search(lambda w: math.nan if w["a"] > 1 else -w["a"], {"a": 0.9}, generations=10)
    assert 0.9 < result.best["a"] <= 1
    assert any(loss == math.inf for _, loss in result.tried)
    drawn = reinforce_search(lambda w: math.inf if w["a"] == 1 else w["a"], {"a": [1.0, 2.0, 3.0]}, budget=20)
    assert drawn.best == {"a": 2.0}
    nothing = WeightSearch()
    nothing.note({"a": 1.0}, math.nan)
    assert nothing.best_so_far == [math.inf]
    with pytest.raises(ValueError, match="None of the 1 trials gave a finite validation loss"):
        nothing.best  # noqa: B018


def test_reinforce_trains_no_choice_twice():
    seen = []
    reinforce_search(lambda w: seen.append(tuple(w.values())) or w["a"] * w["b"], {"a": [1, 2], "b": [1, 3]}, budget=80)
    assert len(seen) == len(set(seen)) <= 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: evolution_search(len, {}), "`initial` is empty"),
        (lambda: evolution_search(len, {"a": 0.0}), r"`initial\['a'\]` must be positive"),
        (lambda: evolution_search(len, {"a": 1.0}, population=3), "`population` must be at least `mu`, got 3 and 4"),
        (lambda: evolution_search(len, {"a": 1.0}, sigma=0.0), "`sigma` must be positive"),
        (lambda: evolution_search(len, {"a": 1.0}, generations=0), "`generations` must be positive"),
        (lambda: recombination_weights(0), "`mu` must be positive, got 0"),
        (lambda: reinforce_search(len, {"a": []}), "`choices` must have at least one weight"),
        (lambda: reinforce_search(len, {"a": [1.0]}, budget=0), "`budget` must be at least one draw"),
        (lambda: reinforce_search(len, {"a": [1.0]}, lr=0.0), "`lr` must be positive"),
        (lambda: reinforce_search(len, {"a": [1.0]}, baseline_momentum=1.0), "`baseline_momentum`"),
        (lambda: expected_reward_gradient(torch.ones(2), torch.ones(3)), r"one shape \(A,\)"),
        (lambda: bilevel_search(len, len, len, {"a": 1.0}, budget=0), "`budget` must be at least one training"),
        (lambda: bilevel_search(len, len, len, {"a": 1.0}, lr=0.0), "`lr` must be positive"),
        (lambda: bilevel_search(len, len, len, {"a": -1.0}), "in its logarithm; got -1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"solver": "lu"}, "`solver` must be 'cg' or 'neumann', got 'lu'"),
        ({"iterations": 0}, "`iterations` must be positive, got 0"),
        ({"damping": -1.0}, "`damping` must not be negative"),
        ({"step_size": 0.0}, "`step_size` must be positive"),
        ({"solver": "neumann", "step_size": 9.0, "iterations": 99}, "The Neumann series diverges"),
    ],
)
def test_bad_settings_of_the_solver_are_refused(golden, arguments, message):
    problem = Quadratic(golden("bilevel_optimum").inputs)
    with pytest.raises(ValueError, match=message):
        hypergradient(problem, 0.7, **arguments)


def test_a_loss_without_second_derivatives_is_refused():
    weight, parameter = torch.ones((), requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="is it linear"):
        implicit_hypergradient(parameter.sum(), parameter.square().sum(), [parameter], weight)
