import math
import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import entropy

from lightning_distill.losses.soft_targets import softened_log_softmax
from lightning_distill.outputs import Outputs, Step
from lightning_distill.temperature import (
    TASK_TEMPERATURES,
    VOCABULARY_TEMPERATURES,
    EntropyTemperature,
    OptimalTemperature,
    TargetEntropyTemperature,
    annealed_temperature,
    capacity_temperature,
    entropy_temperature,
    gradient_variance_temperature,
    layer_temperatures,
    optimal_temperature,
    softened_entropy,
    softmax_jacobian,
    softmax_taylor,
    task_temperature,
    temperature_for_entropy,
    vocabulary_temperature,
)

API = "lightning_distill.temperature."
STUDENT = torch.tensor([2.0, 1.0, -1.0, 0.5], dtype=torch.float64)
TEACHER = torch.tensor([5.0, 2.0, 1.0, -2.0], dtype=torch.float64)


def logits(*shape, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def step(student=None, teacher=None, mask=None):
    student = logits(3, 5, seed=1) if student is None else student
    return Step(batch=None, student=Outputs(student), teacher=None if teacher is None else Outputs(teacher), mask=mask)


# ---------------------------------------------------------------- annealing


@pytest.mark.chapter("A15", api=API + "annealed_temperature")
def test_exponential_annealing_matches_golden(golden):
    case = golden("temperature_anneal")
    tau_max, tau_min, gamma = (case.inputs[key] for key in ("tau_max", "tau_min", "gamma"))
    for number, expected in zip(case.inputs["steps"].tolist(), case.expected["tau"].tolist(), strict=True):
        progress = number / case.inputs["T"]
        for rate in (None, gamma):
            assert annealed_temperature(progress, tau_max, tau_min, gamma=rate) == pytest.approx(expected, rel=1e-9)


@pytest.mark.chapter("A15")
def test_other_rates_end_above_the_minimum_or_reach_it_early():
    assert annealed_temperature(1.0, 8.0, gamma=1.0) == pytest.approx(8 / math.e)
    assert annealed_temperature(0.75, 8.0, gamma=10.0) == 1.0  # 8 * exp(-7.5) is below the minimum


@pytest.mark.parametrize(("shape", "middle"), [("exponential", 4.0), ("linear", 5.0), ("cosine", 5.0)])
def test_every_shape_goes_from_the_maximum_to_the_minimum_and_stays(shape, middle):
    values = [annealed_temperature(i / 20, 8.0, 2.0, shape=shape) for i in range(21)]
    assert values[0] == 8.0
    assert values[10] == pytest.approx(middle)
    assert values[20] == pytest.approx(2.0)
    assert values == sorted(values, reverse=True)
    assert annealed_temperature(3.0, 8.0, 2.0, shape=shape) == pytest.approx(2.0)


def test_cosine_leaves_its_ends_flat():
    steep = [annealed_temperature(t, 8.0, 2.0, shape="linear") for t in (0.0, 0.1, 0.9, 1.0)]
    flat = [annealed_temperature(t, 8.0, 2.0, shape="cosine") for t in (0.0, 0.1, 0.9, 1.0)]
    assert flat[0] - flat[1] < (steep[0] - steep[1]) / 3
    assert flat[2] - flat[3] < (steep[2] - steep[3]) / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"progress": -0.1}, "`progress` must not be negative, got -0.1"),
        ({"progress": math.nan}, "`progress` must not be negative, got nan"),
        ({"tau_min": 0.0}, "0 < tau_min <= tau_max, got 0.0 and 8.0"),
        ({"tau_min": 9.0}, "0 < tau_min <= tau_max, got 9.0 and 8.0"),
        ({"tau_max": math.nan}, "0 < tau_min <= tau_max, got 1.0 and nan"),
        ({"gamma": -1.0}, "`gamma` must not be negative, got -1.0"),
        ({"gamma": 1.0, "shape": "linear"}, "`gamma` is a rate of the exponential shape alone, got 1.0"),
        ({"shape": "step"}, "`shape` must be 'exponential', 'linear' or 'cosine', got 'step'"),
    ],
)
def test_annealing_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        annealed_temperature(**{"progress": 0.5, "tau_max": 8.0, "tau_min": 1.0} | arguments)


# ---------------------------------------------------------------- heuristics


@pytest.mark.chapter("A16", api=API + "capacity_temperature")
def test_capacity_temperature_matches_golden_and_stays_in_range(golden):
    case = golden("temperature_capacity")
    inputs = case.inputs
    result = capacity_temperature(
        student_parameters=inputs["student_params"], teacher_parameters=inputs["teacher_params"], kappa=inputs["kappa"]
    )
    assert result == pytest.approx(case.expected["tau"], rel=1e-9)
    assert capacity_temperature(student_parameters=7, teacher_parameters=7, kappa=3.0) == pytest.approx(3.0)
    assert capacity_temperature(student_parameters=1, teacher_parameters=1e9) == 20.0
    assert capacity_temperature(student_parameters=1e9, teacher_parameters=1) == 1.0


@pytest.mark.chapter("A16")
@pytest.mark.erratum("ERR-10")
def test_square_root_of_the_capacity_ratio_orders_hinton_s_students_the_wrong_way():
    """Hinton et al. (2015), section 3: 30 units a layer, 2.5 to 4 is best; 300 units, anything above 8 is fine."""

    def parameters(units):  # two hidden layers on 784 pixels and 10 classes
        return 785 * units + (units + 1) * units + (units + 1) * 10

    def printed(units):
        return capacity_temperature(
            student_parameters=parameters(units), teacher_parameters=parameters(1200), tau_max=100.0
        )

    assert printed(300) == pytest.approx(10.8, abs=0.1)
    assert printed(30) > 3 * printed(300)  # reported: at most half


@pytest.mark.chapter("A17", api=API + "vocabulary_temperature")
def test_vocabulary_temperature_matches_golden(golden):
    case = golden("temperature_vocab")
    for size, expected in zip(case.inputs["vocab"].tolist(), case.expected["tau"].tolist(), strict=True):
        assert vocabulary_temperature(int(size), tau_base=case.inputs["tau_base"]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.chapter("A17", "A18")
@pytest.mark.erratum("ERR-11")
def test_no_single_base_gives_the_printed_ranges_of_vocabularies():
    sizes = {"gpt-50k": 50_000, "llama-32k": 32_000, "chinese-100k": 100_000}
    implied = {
        name: [tau / vocabulary_temperature(sizes[name], tau_base=1.0) for tau in ends]
        for name, ends in VOCABULARY_TEMPERATURES.items()
    }
    assert implied["gpt-50k"] == pytest.approx([9.6, 16.0], abs=0.05)
    assert implied["llama-32k"] == pytest.approx([8.0, 13.3], abs=0.05)
    assert implied["chinese-100k"] == pytest.approx([12.0, 18.0], abs=0.05)
    by_formula = vocabulary_temperature(100_000) / vocabulary_temperature(32_000)
    by_ranges = [
        chinese / llama
        for chinese, llama in zip(
            VOCABULARY_TEMPERATURES["chinese-100k"], VOCABULARY_TEMPERATURES["llama-32k"], strict=True
        )
    ]
    assert by_formula == pytest.approx(1.11, abs=0.005)
    assert sorted(by_ranges) == pytest.approx([1.5, 1.67], abs=0.005)
    # The ranges by task contradict those by model: factual answers of a LLaMA are outside the range of LLaMA.
    assert TASK_TEMPERATURES["factual"][1] < VOCABULARY_TEMPERATURES["llama-32k"][0]


@pytest.mark.chapter("A18", api=API + "task_temperature")
def test_task_temperature_runs_through_the_range_of_its_task():
    assert task_temperature("factual", position=0.0) == 5.0
    assert task_temperature("factual", position=1.0) == 10.0
    assert task_temperature("creative") == 20.0
    assert task_temperature("dialogue") == 12.5
    with pytest.raises(ValueError, match=r"`task` must be one of .* got 'dialog'\. Did you mean 'dialogue'\?"):
        task_temperature("dialog")


@pytest.mark.chapter("A19", api=API + "layer_temperatures")
def test_layer_temperatures_match_golden(golden):
    case = golden("temperature_layerwise")
    result = layer_temperatures(int(case.inputs["L"]), tau_base=case.inputs["tau_base"], beta=case.inputs["beta"])
    assert result == pytest.approx(case.expected["tau"].tolist(), rel=1e-9)
    falling = layer_temperatures(4, beta=-0.9)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: capacity_temperature(student_parameters=0, teacher_parameters=1), "`student_parameters` must be pos"),
        (lambda: capacity_temperature(student_parameters=1, teacher_parameters=math.nan), "`teacher_parameters` must"),
        (lambda: capacity_temperature(student_parameters=1, teacher_parameters=1, tau_min=0), "0 < tau_min <= tau_max"),
        (lambda: vocabulary_temperature(1), "`vocabulary` must be at least 2, got 1"),
        (lambda: vocabulary_temperature(10, tau_base=0.0), "`tau_base` must be positive and finite, got 0.0"),
        (lambda: task_temperature("factual", position=1.5), r"`position` must be in \[0, 1\], got 1.5"),
        (lambda: layer_temperatures(0), "`layers` must be at least 1, got 0"),
        (lambda: layer_temperatures(4, beta=-1.0), "`beta` must be above -1, .* got -1.0"),
        (lambda: layer_temperatures(4, tau_base=math.inf), "`tau_base` must be positive and finite, got inf"),
    ],
)
def test_heuristics_reject(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- softmax at a temperature


@pytest.mark.chapter("X1", api="lightning_distill.losses.softened_log_softmax")
@pytest.mark.erratum("ERR-69")
def test_two_of_the_three_printed_softmaxes_of_exercise_1_are_wrong(golden):
    case = golden("exercise1_answer_check")
    for tau, printed in case.inputs["chapter"].items():
        probabilities = softened_log_softmax(case.inputs["logits"], float(tau)).exp()
        np.testing.assert_allclose(probabilities, softmax(case.inputs["logits"].numpy() / float(tau)), rtol=1e-12)
        error = (probabilities - printed).abs().max().item()
        assert error == pytest.approx(case.expected["max_abs_error"][tau], rel=1e-9)
        assert (error < 1e-3) == (tau == "1")  # rounding to three digits explains less than 1e-3
        # No temperature at all gives the two wrong rows: each pair of classes implies another one.
        first, second, third = printed.tolist()
        implied = 3 / math.log(first / second), 1 / math.log(second / third)
        assert (abs(implied[0] / implied[1] - 1) < 0.03) == (tau == "1")


def test_softened_entropy_matches_scipy():
    z = logits(4, 6)
    expected = entropy(softmax(z.numpy() / 2.5, axis=-1), axis=-1)
    torch.testing.assert_close(softened_entropy(z, temperature=2.5), torch.from_numpy(expected))
    per_item = softened_entropy(z, temperature=torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
    for i, tau in enumerate((1.0, 2.0, 4.0, 8.0)):
        torch.testing.assert_close(per_item[i], softened_entropy(z[i], temperature=tau))


@pytest.mark.chapter("A09", api=API + "softmax_taylor")
def test_expansion_matches_golden(golden):
    case = golden("high_temperature_expansion")
    z, tau = case.inputs["logits"], case.inputs["tau"]
    torch.testing.assert_close(softmax_taylor(z, temperature=tau), case.expected["first_order"], rtol=1e-9, atol=1e-11)
    second = softmax_taylor(z, temperature=tau, order=2)
    torch.testing.assert_close(second, case.expected["second_order"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(softened_log_softmax(z, tau).exp(), case.expected["exact"], rtol=1e-9, atol=1e-11)


@pytest.mark.chapter("A09")
@pytest.mark.parametrize(("order", "factor"), [(1, 4), (2, 8)])
def test_error_of_the_expansion_falls_with_the_next_power_of_the_temperature(order, factor):
    z = logits(5, 7)

    def error(tau):
        exact = softmax(z.numpy() / tau, axis=-1)
        return np.abs(softmax_taylor(z, temperature=tau, order=order).numpy() - exact).max()

    assert error(200.0) / error(400.0) == pytest.approx(factor, rel=0.05)


def test_expansion_takes_one_temperature_per_item():
    z, tau = logits(2, 5), torch.tensor([20.0, 50.0], dtype=torch.float64)
    result = softmax_taylor(z, temperature=tau, order=2)
    for i in range(2):
        torch.testing.assert_close(result[i], softmax_taylor(z[i], temperature=tau[i].item(), order=2))
    torch.testing.assert_close(result.sum(dim=-1), torch.ones(2, dtype=torch.float64))


@pytest.mark.chapter("A10", api=API + "softmax_jacobian")
def test_jacobian_matches_golden_and_autograd(golden):
    case = golden("softmax_jacobian")
    z, tau = case.inputs["logits"], case.inputs["tau"]
    torch.testing.assert_close(softmax_jacobian(z, temperature=tau), case.expected["jacobian"], rtol=1e-9, atol=1e-11)
    by_autograd = torch.autograd.functional.jacobian(lambda v: torch.softmax(v / 3.0, dim=-1), z)
    torch.testing.assert_close(softmax_jacobian(z, temperature=3.0), by_autograd)


@pytest.mark.chapter("A10")
def test_jacobian_is_symmetric_positive_semidefinite_of_rank_n_minus_1_and_sums_to_zero():
    z, tau = logits(4, 5), torch.tensor([0.5, 1.0, 4.0, 20.0], dtype=torch.float64)
    jacobian = softmax_jacobian(z, temperature=tau)
    torch.testing.assert_close(jacobian, jacobian.mT)
    torch.testing.assert_close(jacobian.sum(dim=-1), torch.zeros(4, 5, dtype=torch.float64), rtol=0, atol=1e-15)
    eigenvalues = torch.linalg.eigvalsh(jacobian[1:])
    assert eigenvalues[:, 0].abs().max() < 1e-15
    assert (eigenvalues[:, 1:] > 1e-6).all()
    for i in range(4):
        torch.testing.assert_close(jacobian[i], softmax_jacobian(z[i], temperature=tau[i].item()))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0])])
@pytest.mark.parametrize("function", [softmax_taylor, softmax_jacobian])
def test_expansion_and_jacobian_reject_temperatures(function, temperature):
    with pytest.raises(ValueError, match="`temperature` must be positive"):
        function(torch.zeros(2, 3), temperature=temperature)


def test_expansion_rejects_other_orders():
    with pytest.raises(ValueError, match="`order` must be 1 or 2, got 3"):
        softmax_taylor(torch.zeros(3), temperature=1.0, order=3)


# ---------------------------------------------------------------- entropy


@pytest.mark.chapter("A13", api=API + "EntropyTemperature")
def test_entropy_temperature_matches_golden(golden):
    case = golden("temperature_uncertainty")
    teacher = case.inputs["p_teacher"].log()
    arguments = {"tau0": case.inputs["tau0"], "alpha": case.inputs["alpha"]}
    for normalise, key in ((False, "tau"), (True, "tau_normalised")):
        expected = case.expected[key]
        result = entropy_temperature(teacher, **arguments, normalise=normalise)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)
        rule = EntropyTemperature(**arguments, normalise=normalise)
        torch.testing.assert_close(rule(step(teacher=teacher)), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.chapter("A13")
def test_entropy_temperature_of_a_certain_teacher_is_tau0():
    certain = torch.tensor([[1e4, 0.0, -1e4], [-math.inf, 0.0, -math.inf]])
    assert entropy_temperature(certain, tau0=3.0, alpha=2.0).tolist() == [3.0, 3.0]
    assert entropy_temperature(torch.zeros(2, 1), tau0=3.0, normalise=True).tolist() == [3.0, 3.0]  # one class


@pytest.mark.chapter("A12", api=API + "TargetEntropyTemperature")
def test_temperature_for_entropy_matches_golden(golden):
    case = golden("temperature_for_target_entropy")
    targets = case.inputs["target_entropy_nats"].tolist()
    for target, expected in zip(targets, case.expected["tau"], strict=True):
        tau = temperature_for_entropy(case.inputs["logits"], target)
        torch.testing.assert_close(tau, expected, rtol=1e-7, atol=0)
        assert entropy(softmax(case.inputs["logits"].numpy() / tau.item())) == pytest.approx(target, abs=1e-8)


@pytest.mark.chapter("A12")
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)]
)
def test_temperature_for_entropy_solves_every_item_of_a_batch(dtype, tolerance):
    z = logits(2, 4, 9).to(dtype)
    tau = temperature_for_entropy(z, 1.2)
    assert tau.shape == (2, 4)
    for item, found in zip(z.double().reshape(-1, 9).numpy(), tau.reshape(-1).tolist(), strict=True):
        root = brentq(lambda t, item=item: entropy(softmax(item / t)) - 1.2, 1e-2, 1e3, xtol=1e-14)
        assert found == pytest.approx(root, rel=10 * tolerance)


@pytest.mark.chapter("A12")
def test_temperature_for_entropy_stops_at_its_bounds():
    tied = torch.tensor([[3.0, 3.0, 0.0]])  # has at least log 2 nats at any temperature
    assert temperature_for_entropy(tied, 0.5, tau_min=0.25).item() == pytest.approx(0.25)
    far = torch.tensor([[1e4, 0.0, -1e4]])
    assert temperature_for_entropy(far, 1.0, tau_max=30.0).item() == pytest.approx(30.0)
    rule = TargetEntropyTemperature(1.0, tau_max=30.0)
    torch.testing.assert_close(rule(step(teacher=far)), torch.tensor([30.0]))


# ---------------------------------------------------------------- entropy against divergence


def printed_objective(tau, beta, scale=1.0):
    """The chapter's H(p_T) - beta KL(p_S || p_T), in SciPy."""
    log_q, log_p = log_softmax(STUDENT.numpy() / tau), log_softmax(TEACHER.numpy() / tau)
    return entropy(np.exp(log_p)) - beta * scale * rel_entr(np.exp(log_q), np.exp(log_p)).sum()


@pytest.mark.chapter("A12")
@pytest.mark.erratum("ERR-08")
def test_printed_optimal_temperature_is_the_end_of_every_grid(golden):
    case = golden("temperature_objective_as_written")
    grid = case.inputs["grid"].tolist()
    values = [printed_objective(tau, case.inputs["beta"]) for tau in grid]
    np.testing.assert_allclose(values, case.expected["objective"], rtol=1e-9)
    assert grid[int(np.argmax(values))] == case.expected["argmax_tau"] == grid[-1]
    for beta in (0.1, 1.0, 10.0):
        wide = np.geomspace(0.5, 1e4, 200)
        assert np.argmax([printed_objective(tau, beta) for tau in wide]) == 199
    # The entropy alone rises throughout: dH/dtau = Var_p(z) / tau^3.
    tau, p = 2.0, softmax(TEACHER.numpy() / 2.0)
    variance = (p * TEACHER.numpy() ** 2).sum() - (p @ TEACHER.numpy()) ** 2
    slope = (entropy(softmax(TEACHER.numpy() / (tau + 1e-5))) - entropy(softmax(TEACHER.numpy() / (tau - 1e-5)))) / 2e-5
    assert slope == pytest.approx(variance / tau**3, rel=1e-6)
    # With the factor tau^2 there is an optimum inside, and ours finds it.
    fine = np.geomspace(1, 100, 401).tolist()
    ours = optimal_temperature(STUDENT, TEACHER, beta=0.5, direction="reverse", grid=fine)
    assert ours == fine[int(np.argmax([printed_objective(tau, 0.5, scale=tau**2) for tau in fine]))]
    assert ours == pytest.approx(11.64, rel=0.02)


@pytest.mark.chapter("A12", api=API + "OptimalTemperature")
def test_optimal_temperature_maximises_the_mean_over_the_items_that_count():
    student, teacher = logits(6, 4, seed=1, scale=1.0), logits(6, 4, seed=2)
    grid = np.geomspace(1, 100, 60).tolist()

    def objective(tau):
        p, q = (softmax(z.numpy() / tau, axis=-1) for z in (teacher, student))
        return (entropy(p, axis=-1) - 0.3 * tau**2 * rel_entr(p, q).sum(axis=-1)).mean()

    expected = grid[int(np.argmax([objective(tau) for tau in grid]))]
    assert grid[0] < expected < grid[-1]
    assert optimal_temperature(student, teacher, beta=0.3, grid=grid) == expected

    padding = 8 * logits(2, 4, seed=3)
    student, teacher = torch.cat([padding, student]), torch.cat([padding.flip(-1), teacher])
    mask = torch.arange(8) >= 2
    assert optimal_temperature(student, teacher, beta=0.3, grid=grid, mask=mask) == expected
    assert OptimalTemperature(0.3, grid=grid)(step(student, teacher, mask)) == expected
    with pytest.warns(UserWarning, match="end of the grid"):
        assert optimal_temperature(student, teacher, beta=0.3, grid=grid) != expected


@pytest.mark.chapter("A12")
@pytest.mark.parametrize(("beta", "end"), [(0.0, 20.0), (100.0, 1.0)])
def test_optimal_temperature_warns_at_the_ends_of_its_grid(beta, end):
    with pytest.warns(UserWarning, match="The best temperature is an end of the grid"):
        assert optimal_temperature(STUDENT, TEACHER, beta=beta) == pytest.approx(end)


def test_optimal_temperature_is_finite_where_no_item_counts():
    with pytest.warns(UserWarning, match="end of the grid"):
        tau = optimal_temperature(logits(3, 4), logits(3, 4), mask=torch.zeros(3, dtype=torch.bool))
    assert tau == 1.0


# ---------------------------------------------------------------- gradient variance


@pytest.mark.chapter("A14", api=API + "gradient_variance_temperature")
def test_gradient_variance_temperature_matches_golden(golden):
    case = golden("temperature_gradient_variance")
    hard, soft = case.inputs["grads_ce"], case.inputs["grads_kl"]
    bounds = {"tau_min": case.inputs["tau_min"], "tau_max": case.inputs["tau_max"]}
    tau = gradient_variance_temperature(hard, soft, tau0=case.inputs["tau0"], **bounds)
    assert tau == pytest.approx(case.expected["tau"], rel=1e-9)
    assert gradient_variance_temperature(hard, soft) == 20.0  # the default upper bound
    assert gradient_variance_temperature(soft, hard) == 1.0
    assert gradient_variance_temperature(hard, hard + 7, tau0=3.0) == pytest.approx(3.0)
    still = torch.ones(3, 2)
    assert gradient_variance_temperature(hard, still) == 20.0
    assert gradient_variance_temperature(still, still, tau0=3.0) == 3.0


@pytest.mark.chapter("A14")
@pytest.mark.erratum("ERR-09")
def test_printed_gradient_variance_rule_runs_away_without_the_squared_temperature():
    """Micro-batches are single samples; the network is its logits, so gradients are in closed form."""
    student, teacher = logits(64, 10, seed=1, scale=1.0), logits(64, 10, seed=2, scale=2.0)
    labels = teacher.argmax(dim=-1)
    hard = student.softmax(dim=-1) - torch.nn.functional.one_hot(labels, 10)

    def soft(tau, power):  # gradient of tau^power * KL(p_T || p_S) at temperature tau
        return tau ** (power - 1) * ((student / tau).softmax(dim=-1) - (teacher / tau).softmax(dim=-1))

    def variance(tau, power):
        return soft(tau, power).var(dim=0, correction=0).sum().item()

    assert [variance(tau, 0) for tau in (1.0, 16.0)] == pytest.approx([0.37, 6.6e-6], rel=0.02)
    assert all(0.36 < variance(tau, 2) < 0.44 for tau in (1.0, 2.0, 4.0, 8.0, 16.0))

    def iterate(power, steps, tau=4.0):
        for _ in range(steps):
            tau = gradient_variance_temperature(hard, soft(tau, power), tau0=4.0, tau_min=1e-3, tau_max=1e6)
        return tau

    assert [iterate(0, steps) for steps in (1, 2, 3)] == pytest.approx([99.0, 60_089, 1e6], rel=1e-3)
    assert [iterate(2, steps) for steps in (1, 6)] == pytest.approx([6.19, 6.19], abs=0.01)


@pytest.mark.parametrize(
    ("hard", "soft", "message"),
    [
        (torch.ones(1, 3), torch.ones(1, 3), r"M >= 2 micro-batches, got \(1, 3\) and \(1, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 4), r"must have the same shape \(M, P\) .* got \(2, 3\) and \(2, 4\)"),
        (torch.ones(4), torch.ones(4), r"must have the same shape \(M, P\)"),
        (torch.tensor([[math.inf], [0.0]]), torch.ones(2, 1), "must be finite; skip steps whose gradients overflowed"),
    ],
)
def test_gradient_variance_temperature_rejects(hard, soft, message):
    with pytest.raises(ValueError, match=message):
        gradient_variance_temperature(hard, soft)


# ---------------------------------------------------------------- rules

RULES = [
    EntropyTemperature(),
    EntropyTemperature(normalise=True),
    TargetEntropyTemperature(0.5),
    OptimalTemperature(grid=[0.5, 1, 2, 4]),
]


@pytest.mark.filterwarnings("ignore:The best temperature is an end of the grid")
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_rules_are_finite_positive_and_without_gradient(rule, dtype, scale):
    student = (scale * logits(2, 3, 5, seed=1, scale=1.0)).to(dtype).requires_grad_()
    teacher = (scale * logits(2, 3, 5, seed=2, scale=1.0)).to(dtype).requires_grad_()
    tau = rule(step(student, teacher))
    if isinstance(tau, torch.Tensor):
        assert tau.shape == (2, 3)
        assert not tau.requires_grad
    tau = torch.as_tensor(tau)
    assert tau.isfinite().all()
    assert (tau > 0).all()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_need_a_teacher(rule):
    with pytest.raises(ValueError, match=f"{type(rule).__name__} reads the teacher's logits, but there is no teacher"):
        rule(step())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_survive_pickling(rule):
    assert vars(pickle.loads(pickle.dumps(rule))) == vars(rule)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EntropyTemperature(tau0=0.0), "`tau0` must be positive and finite, got 0.0"),
        (lambda: EntropyTemperature(alpha=math.nan), "`alpha` must not be negative, got nan"),
        (lambda: TargetEntropyTemperature(0.0), "`target_nats` must be positive and finite, got 0.0"),
        (lambda: TargetEntropyTemperature(1.0, tau_min=3.0, tau_max=2.0), "0 < tau_min <= tau_max, got 3.0 and 2.0"),
        (lambda: OptimalTemperature(beta=-1.0), "`beta` must not be negative, got -1.0"),
        (lambda: OptimalTemperature(direction="both"), "`direction` must be 'forward' or 'reverse', got 'both'"),
        (lambda: OptimalTemperature(grid=[1.0, 2.0]), "at least three increasing positive temperatures"),
        (lambda: OptimalTemperature(grid=[1.0, 1.0, 2.0]), "at least three increasing positive temperatures"),
        (lambda: OptimalTemperature(grid=[0.0, 1.0, 2.0]), "at least three increasing positive temperatures"),
        (lambda: OptimalTemperature(grid=[1.0, math.nan, 2.0]), "at least three increasing positive temperatures"),
    ],
)
def test_rules_are_checked_at_construction(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_entropy_target_must_be_reachable():
    with pytest.raises(ValueError, match=r"between 0 and log\(C\) = 1.3863 for 4 classes, got 1.5"):
        temperature_for_entropy(torch.zeros(2, 4), 1.5)
    with pytest.raises(ValueError, match=r"got nan"):
        temperature_for_entropy(torch.zeros(2, 4), math.nan)


def test_optimal_temperature_needs_equal_shapes():
    with pytest.raises(ValueError, match=r"must have the same shape, got \(2, 3\) and \(2, 4\)"):
        optimal_temperature(torch.zeros(2, 3), torch.zeros(2, 4))
