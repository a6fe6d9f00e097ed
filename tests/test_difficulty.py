"""Difficulty of a task, and what is made of it."""

import itertools
import math

import pytest
import torch

from lightning_distill.difficulty import (
    alignment_factor,
    difficulty_temperature,
    difficulty_weight,
    gradient_cosine,
    multi_task_loss,
    task_difficulty,
)
from lightning_distill.weighting import MultiTaskWeights

ROOM = "lightning_distill.difficulty"


@pytest.mark.chapter("C22", api=f"{ROOM}.task_difficulty")
def test_task_difficulty_matches_golden(golden):
    case = golden("task_difficulty")
    teacher, student, better = (case.inputs[name] for name in ("acc_T", "acc_S", "acc_S_better"))
    assert task_difficulty(teacher, student) == pytest.approx(case.expected["D"], rel=case.rtol)
    assert task_difficulty(teacher, better, clip=False) == pytest.approx(case.expected["D_better"], rel=case.rtol)
    assert task_difficulty(teacher, better) == case.expected["clipped"]
    assert task_difficulty(0.7, 0.7) == 0
    assert task_difficulty(0.0, 0.0) == 0
    assert task_difficulty(0.0, 0.5) == 0
    assert task_difficulty(0.9, 0.0) == 1


@pytest.mark.chapter("C23", api=f"{ROOM}.gradient_cosine")
def test_gradient_cosine_matches_golden_and_has_its_bounds(golden):
    case = golden("gradient_similarity")
    first, second = case.inputs["g1"], case.inputs["g2"]
    assert gradient_cosine(first, second) == pytest.approx(case.expected["cos"], rel=case.rtol)
    assert gradient_cosine(first, first * 1e-20) == pytest.approx(1.0)
    assert gradient_cosine(first, -3 * first) == pytest.approx(-1.0)
    assert gradient_cosine(first, 0 * first) == 0
    values = torch.randn(50, 2, 3, 4)
    assert all(-1 <= gradient_cosine(a, b) <= 1 for a, b in values)
    same = torch.full((10**5,), 0.1)
    assert gradient_cosine(same, same) <= 1
    half = torch.tensor([3e4, 3e4], dtype=torch.float16)  # the squares overflow in float16
    assert gradient_cosine(half, half) == pytest.approx(1.0)


@pytest.mark.chapter("C25", api=f"{ROOM}.difficulty_temperature")
def test_difficulty_temperature_matches_golden_and_is_clamped(golden):
    case = golden("temperature_task")
    tau0, beta, difficulty = (case.inputs[name] for name in ("tau0", "beta", "D"))
    assert difficulty_temperature(difficulty, tau0=tau0, beta=beta) == pytest.approx(case.expected["tau"])
    assert difficulty_temperature(0.0, tau0=tau0, beta=beta) == tau0
    assert difficulty_temperature(100.0, tau0=tau0, beta=beta) == 20.0
    assert difficulty_temperature(1.0, tau0=tau0, beta=-5.0) == 0.5


@pytest.mark.chapter("C26", api=f"{ROOM}.difficulty_weight")
def test_difficulty_weight_matches_golden_and_never_falls(golden):
    case = golden("kd_weight_task")
    found = [
        difficulty_weight(d, weight0=case.inputs["lambda0"], limit=case.inputs["theta"])
        for d in case.inputs["D"].tolist()
    ]
    assert found == pytest.approx(case.expected["weight"].tolist(), rel=case.rtol)
    curve = [difficulty_weight(i / 1000) for i in range(1001)]
    assert all(0 <= after - before <= 0.0011 for before, after in itertools.pairwise(curve))


@pytest.mark.erratum("ERR-51")
def test_printed_weight_of_a_hard_task_falls_by_the_whole_weight_at_the_limit(golden):
    """As printed, a task just beyond the limit gets less of its teacher than one that is mastered."""
    case = golden("kd_weight_task_as_written")
    weight0, limit = case.inputs["lambda0"], case.inputs["theta"]

    def printed(difficulty):
        return weight0 * (1 + difficulty) if difficulty < limit else weight0 * limit

    assert [printed(d) for d in case.inputs["D"].tolist()] == pytest.approx(case.expected["weight"].tolist())
    below, at = limit - 1e-9, limit
    assert printed(below) - printed(at) == pytest.approx(weight0, abs=1e-6)
    assert printed(0.8) < printed(0.0)
    ours = [difficulty_weight(d, weight0=weight0, limit=limit) for d in (0.0, below, at, 0.8)]
    assert ours == sorted(ours)
    assert ours[2] - ours[1] == pytest.approx(0, abs=1e-6)


@pytest.mark.chapter("C27", api=f"{ROOM}.alignment_factor")
def test_alignment_factor_matches_golden_and_rises_with_agreement(golden):
    case = golden("lr_alignment")
    cosines = case.inputs["S"].tolist()
    found = [case.inputs["eta0"] * alignment_factor(s, alpha=case.inputs["alpha"]) for s in cosines]
    assert found == pytest.approx(case.expected["lr"].tolist(), rel=case.rtol)
    assert found == sorted(found)
    assert alignment_factor(1.0, alpha=3.0) == 1
    assert alignment_factor(-1.0, alpha=3.0) == pytest.approx(math.exp(-6))
    assert alignment_factor(-0.3, alpha=0.0) == 1


@pytest.mark.erratum("ERR-52")
def test_printed_learning_rate_is_highest_where_the_gradients_conflict(golden):
    case = golden("lr_alignment_as_written")
    eta0, alpha = case.inputs["eta0"], case.inputs["alpha"]
    cosines = case.inputs["S"].tolist()
    printed = [eta0 * math.exp(-alpha * s) for s in cosines]
    assert printed == pytest.approx(case.expected["lr"].tolist(), rel=case.rtol)
    assert printed[0] / eta0 == pytest.approx(2.718, abs=1e-3)  # full conflict
    assert printed[-1] / eta0 == pytest.approx(0.368, abs=1e-3)  # full agreement
    # read as a power of the step, a conflict makes it jump up and down
    assert [round(math.exp(-alpha * (-1.0) ** step), 2) for step in range(4)] == [0.37, 2.72, 0.37, 2.72]
    assert alignment_factor(-1.0) < alignment_factor(1.0)


@pytest.mark.chapter("C28", api=f"{ROOM}.multi_task_loss")
def test_multi_task_loss_matches_golden_and_is_linear_in_the_weights(golden):
    case = golden("multitask_total")
    hard, soft = case.inputs["ce"].requires_grad_(), case.inputs["kd"].requires_grad_()
    weights, kd_weights = case.inputs["w"].tolist(), case.inputs["lam"].tolist()
    total = multi_task_loss(list(hard), list(soft), weights=weights, kd_weights=kd_weights)
    assert total.item() == pytest.approx(case.expected["total"], rel=case.rtol)
    total.backward()
    assert hard.grad.tolist() == weights
    assert soft.grad.tolist() == pytest.approx([w * k for w, k in zip(weights, kd_weights, strict=True)])
    double = multi_task_loss(list(hard), list(soft), weights=[2 * w for w in weights], kd_weights=kd_weights)
    assert double.item() == pytest.approx(2 * total.item())


def test_multi_task_weights_say_what_they_do():
    weighting = MultiTaskWeights({"a": 0.5, "b": 2.0}, {"b": 0.25})
    assert weighting.weights() == {"a/hard": 0.5, "a/soft": 0.5, "b/hard": 2.0, "b/soft": 0.5}
    losses = {name: torch.tensor(float(i)) for i, name in enumerate(weighting.weights(), 1)}
    expected = sum(weight * losses[name] for name, weight in weighting.weights().items())
    assert weighting(losses).item() == pytest.approx(float(expected)) == 0.5 + 1.0 + 6.0 + 2.0
    weighting.kd_weights["a"] = 0.0  # as a callback may
    assert weighting(losses).item() == pytest.approx(0.5 + 6.0 + 2.0)
    with pytest.raises(ValueError, match=r"weighs the terms \['a/hard'"):
        weighting({"hard": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: task_difficulty(-0.1, 0.5), "`teacher_accuracy` must not be negative, got -0.1"),
        (lambda: task_difficulty(0.5, math.nan), "`student_accuracy` must not be negative, got nan"),
        (lambda: difficulty_temperature(0.1, tau0=0.0), "`tau0` must be positive"),
        (lambda: difficulty_temperature(math.nan), "`difficulty` and `beta` must be finite"),
        (lambda: difficulty_temperature(0.1, tau_min=3.0, tau_max=2.0), "`tau_min` and `tau_max`"),
        (lambda: difficulty_weight(-0.1), "`difficulty` must not be negative"),
        (lambda: difficulty_weight(0.1, limit=-1.0), "`limit` must not be negative"),
        (lambda: alignment_factor(1.1), r"`cosine` must be in \[-1, 1\], got 1.1"),
        (lambda: alignment_factor(0.0, alpha=-1.0), "`alpha` must not be negative"),
        (lambda: gradient_cosine(torch.ones(2), torch.ones(3)), r"same shape, got \(2,\) and \(3,\)"),
        (lambda: gradient_cosine(torch.tensor([math.inf]), torch.ones(1)), "must be finite"),
        (lambda: multi_task_loss([], [], weights=[], kd_weights=[]), "one entry per task, at least one"),
        (lambda: multi_task_loss([torch.ones(())], [torch.ones(())], weights=[-1.0], kd_weights=[1.0]), "`weights`"),
        (lambda: MultiTaskWeights({}), "`tasks` is empty"),
        (lambda: MultiTaskWeights({"a": 1.0}, {"b": 1.0}), r"names \['b'\], which are no tasks; there are \['a'\]"),
        (lambda: MultiTaskWeights({"a": -1.0}), r"`tasks\['a'\]` must not be negative, got -1.0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
