"""Scores, choices and reports of pools against numbers computed elsewhere."""

import math

import pytest
import torch

from lightning_distill.diagnostics import (
    complementarity,
    correlation_filter,
    diversity,
    output_correlation,
    pairing_report,
)
from lightning_distill.teachers.pools import (
    StudentCapability,
    adaptive_threshold,
    bucket_by_difficulty,
    confidence_difficulty,
    cost_aware_scores,
    evaluate_until,
    explore,
    hard_select,
    load_balance,
    mixture_nll,
    route,
    sample_teacher,
    select_by_difficulty,
    soft_select,
    teacher_scores,
    teacher_weight,
    vote_disagreement,
)


def close(found, case, key):
    torch.testing.assert_close(found.double(), case.expected[key].double(), rtol=max(case.rtol, 1e-6), atol=1e-7)


@pytest.mark.chapter("C29", api="lightning_distill.teachers.pools.teacher_scores")
def test_scores(golden):
    case = golden("teacher_score")
    probs = case.inputs["teacher_probs"].unsqueeze(1)
    weights = {name: float(case.inputs[name]) for name in ("alpha", "beta", "gamma")}
    label = torch.tensor([int(case.inputs["label"])])
    close(teacher_scores(probs, label, **weights).squeeze(0), case, "scores")
    unlabelled = teacher_scores(probs, torch.tensor([-100]), **weights)
    torch.testing.assert_close(unlabelled, teacher_scores(probs, None, **weights))
    soft = torch.nn.functional.one_hot(label, 3).double()
    torch.testing.assert_close(teacher_scores(probs, soft, **weights), teacher_scores(probs, label, **weights))


@pytest.mark.chapter("C31", api="lightning_distill.teachers.pools.vote_disagreement")
def test_difficulties(golden):
    case = golden("teacher_disagreement")
    votes = torch.nn.functional.one_hot(case.inputs["votes"].long().T, 3)  # (T, B, C)
    close(vote_disagreement(votes), case, "vote")
    top = case.inputs["pmax"].T
    probs = torch.stack([top, 0.6 * (1 - top), 0.4 * (1 - top)], dim=-1)
    close(confidence_difficulty(probs.clamp_min(0)), case, "confidence")


@pytest.mark.chapter("C31", api="lightning_distill.teachers.pools.select_by_difficulty")
def test_teachers_by_difficulty():
    difficulty = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.8])
    assert select_by_difficulty(difficulty, (0.3, 0.6)).tolist() == [0, 0, 1, 1, 2]
    assert select_by_difficulty(difficulty, ()).tolist() == [0] * 5
    with pytest.raises(ValueError, match=r"`thresholds` must be finite and must not fall, got \[0.6, 0.3\]"):
        select_by_difficulty(difficulty, (0.6, 0.3))


@pytest.mark.chapter("C32", api="lightning_distill.teachers.pools.hard_select")
def test_the_highest_score_and_the_first_of_equal_ones(golden):
    case = golden("teacher_hard_selection")
    assert hard_select(case.inputs["scores"]).tolist() == case.expected["index"].long().tolist()


@pytest.mark.chapter("C33", api="lightning_distill.teachers.pools.soft_select")
def test_soft_shares(golden):
    case = golden("teacher_soft_selection")
    weights = soft_select(case.inputs["scores"], tau=float(case.inputs["tau"]))
    close(weights, case, "weights")
    close(weights @ case.inputs["teacher_probs"], case, "p")
    torch.testing.assert_close(soft_select(case.inputs["scores"], tau=1e-4), torch.eye(3, dtype=torch.float64)[0])
    torch.testing.assert_close(soft_select(case.inputs["scores"], tau=1e6), torch.full((3,), 1 / 3).double())


@pytest.mark.chapter("C34", api="lightning_distill.teachers.pools.sample_teacher")
def test_drawn_with_probabilities(golden):
    case = golden("teacher_probabilistic")
    scores, tau = case.inputs["scores"], float(case.inputs["tau"])
    close(soft_select(scores, tau=tau), case, "P")
    drawn = sample_teacher(scores.expand(40000, -1), tau=tau, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 40000
    torch.testing.assert_close(shares.double(), case.expected["P"], rtol=0, atol=0.01)


@pytest.mark.erratum("ERR-53")
def test_scores_over_their_sum_are_no_probabilities(golden):
    case = golden("teacher_probabilistic_as_written")
    printed = case.inputs["scores"] / case.inputs["scores"].sum()
    close(printed, case, "P")
    assert printed.min() < 0
    assert printed.max() > 1


@pytest.mark.chapter("C35", api="lightning_distill.teachers.pools.route")
def test_a_router_mixes_teachers(golden):
    case = golden("moe_teacher")
    logits = case.inputs["h"] @ case.inputs["W_r"].T
    shares = route(logits)
    close(shares, case, "router")
    probs = case.inputs["teacher_probs"]
    probs = probs if probs.shape[0] == 3 else probs.transpose(0, 1)
    close(torch.einsum("bt,tbc->bc", shares, probs), case, "p")
    torch.testing.assert_close(route(torch.zeros(2, 3)), torch.full((2, 3), 1 / 3))
    two = route(logits, top_k=2)
    assert ((two > 0).sum(-1) == 2).all()
    torch.testing.assert_close(two.sum(-1), torch.ones(2).double())


@pytest.mark.chapter("C35", api="lightning_distill.teachers.pools.load_balance")
def test_balance_is_least_where_all_are_used_alike():
    even = torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    assert load_balance(even).item() == pytest.approx(1.0)
    assert load_balance(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).item() == 2.0
    weights = torch.tensor([[0.9, 0.1], [0.8, 0.2]], requires_grad=True)
    (gradient,) = torch.autograd.grad(load_balance(weights), weights)
    assert gradient.tolist() == [[1.0, 0.0], [1.0, 0.0]]  # T * f / B


def test_the_mixture_s_loss_and_its_gradient():
    members = torch.randn(3, 5, 4, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, -100, 1, 2])
    found = mixture_nll(route(logits), members, labels)
    mixture = torch.einsum("bt,tbc->bc", route(logits), members.exp())
    expected = torch.nn.functional.nll_loss(mixture.log(), labels, reduction="none", ignore_index=-100)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss.sum(), logits, retain_graph=True) for loss in (found, expected))
    )
    soft = torch.nn.functional.one_hot(labels.clamp_min(0), 4).double()
    hard = mixture_nll(route(logits), members, labels.clamp_min(0))
    torch.testing.assert_close(mixture_nll(route(logits), members, soft), hard)


@pytest.mark.chapter("C36", api="lightning_distill.diagnostics.pairing_report")
@pytest.mark.erratum("ERR-54")
def test_a_choice_may_be_worse_than_the_best_single_teacher(golden):
    case = golden("dynamic_pairing_bound")
    accuracy, mass = case.inputs["acc_region_by_teacher"], case.inputs["region_mass"]
    best = pairing_report(accuracy, torch.tensor([0, 1]), mass)
    worst = pairing_report(accuracy, torch.tensor([1, 0]), mass)
    assert best.selected == best.oracle == pytest.approx(float(case.expected["oracle"]))
    assert worst.selected == worst.worst == pytest.approx(float(case.expected["worst_rule"]))
    assert worst.best_single == pytest.approx(float(case.expected["best_single"]))
    assert worst.random == pytest.approx(float(case.expected["uniform_random"]))
    assert worst.random <= worst.best_single
    assert worst.selected < worst.best_single < worst.oracle  # the printed guarantee does not hold
    assert worst.regret == pytest.approx(worst.oracle - worst.selected)
    mixed = pairing_report(accuracy, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), mass)
    assert mixed.selected == pytest.approx(mixed.random)


@pytest.mark.chapter("C37", api="lightning_distill.teachers.pools.evaluate_until")
def test_the_search_ends_with_the_first_sure_teacher(golden):
    case = golden("teacher_early_stop")
    sure, asked = case.inputs["pmax_in_cost_order"], []

    def confidence(place, rows):
        asked.append((place, rows.tolist()))
        return sure[rows, place]

    found = evaluate_until(confidence, 3, torch.arange(3), threshold=float(case.inputs["threshold"]))
    assert found.evaluated.tolist() == case.expected["evaluated"].long().tolist()
    assert found.chosen.tolist() == case.expected["chosen"].long().tolist()
    assert asked == [(0, [0, 1, 2]), (1, [0, 1]), (2, [1])]


@pytest.mark.chapter("C38", api="lightning_distill.diagnostics.diversity")
@pytest.mark.erratum("ERR-55")
def test_diversity_and_what_a_pool_could_know(golden):
    case = golden("teacher_diversity")
    outputs, correct = case.inputs["outputs_TNC"], case.inputs["correct_TN"].bool()
    assert diversity(outputs) == pytest.approx(float(case.expected["D"]), rel=1e-9)
    unbiased = diversity(outputs, unbiased=True)
    assert unbiased == pytest.approx(float(case.expected["D_unbiased"]), rel=1e-9)
    assert diversity(outputs) == pytest.approx(unbiased * 2 / 3)  # the printed one counts each teacher with itself
    correlation = output_correlation(outputs)
    largest = (correlation - torch.eye(3)).abs().max().item()
    assert largest == pytest.approx(float(case.expected["max_abs_corr"]), rel=1e-9)
    assert correlation_filter(outputs, 0.5) == [0, 1, 2]
    assert len(correlation_filter(outputs, 0.4)) == 2
    twins = torch.cat([outputs, outputs[:1]])
    assert correlation_filter(twins, 0.9, order=[3, 2, 1, 0]) == [3, 2, 1]
    gap = float(case.expected["oracle_accuracy"]) - float(case.expected["best_single_accuracy"])
    assert complementarity(correct) == pytest.approx(gap)
    assert diversity(outputs[:1].expand(3, -1, -1)) == 0


@pytest.mark.chapter("C39", api="lightning_distill.teachers.pools.StudentCapability")
def test_capability_and_threshold(golden):
    case = golden("student_capability")
    rates, dt = case.inputs["rate"].tolist(), float(case.inputs["dt"])
    capability = StudentCapability(float(case.inputs["C0"]), rate=rates[0])
    found = [capability.value, *(capability.update(rate, dt) for rate in rates[1:])]
    assert found == pytest.approx(case.expected["C"].tolist())
    options = {"theta0": float(case.inputs["theta0"]), "alpha": float(case.inputs["alpha"])}
    assert [adaptive_threshold(c, **options) for c in found] == pytest.approx(case.expected["theta"].tolist())
    steady = StudentCapability(0.1, rate=0.3)
    for _ in range(4):
        steady.update(0.3, 0.25)
    assert steady.value == pytest.approx(0.1 + 0.3)
    assert teacher_weight(2.0, w0=0.5, kappa=0.3) == pytest.approx(0.5 * math.exp(-0.6))


@pytest.mark.chapter("X5", api="lightning_distill.teachers.pools.cost_aware_scores")
def test_exercise_5(golden):
    case = golden("exercise5_teacher_choice")
    options = {name: float(case.inputs[name]) for name in ("alpha", "beta", "gamma")}
    scores = cost_aware_scores(case.inputs["acc"], case.inputs["cost"], case.inputs["conf"], **options)
    close(scores, case, "scores")
    close(soft_select(scores, tau=float(case.inputs["tau"])), case, "P")
    frugal = cost_aware_scores(case.inputs["acc"], case.inputs["cost"], case.inputs["conf"], beta=1e6)
    assert frugal.argmax() == 2


def test_exploration_and_buckets():
    choice = torch.zeros(20000, dtype=torch.long)
    explored = explore(choice, 4, 0.4, generator=torch.Generator().manual_seed(1))
    assert (explored > 0).double().mean().item() == pytest.approx(0.3, abs=0.01)  # a quarter is drawn again
    parts = bucket_by_difficulty(torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7]), 2)
    assert [part.tolist() for part in parts] == [[1, 3, 0], [4, 2]]


REFUSED = {
    "probs": (lambda: teacher_scores(torch.ones(3, 2)), r"must have the shape \(teachers, samples, classes\)"),
    "weight": (lambda: teacher_scores(torch.ones(1, 1, 1), alpha=math.nan), "`alpha` must be finite"),
    "cost": (lambda: cost_aware_scores([0.5], [-1.0], gamma=0), "`cost` must be finite and not negative"),
    "accuracy": (lambda: cost_aware_scores([1.5], [1.0], gamma=0), r"`accuracy` must be in \[0, 1\]"),
    "confidence": (lambda: cost_aware_scores([0.5], [1.0]), "`confidence` is None, but `gamma` is 0.3"),
    "tau": (lambda: soft_select(torch.ones(2), tau=0), "`tau` must be positive and finite, got 0"),
    "epsilon": (lambda: explore(torch.zeros(2), 3, 1.5), r"`epsilon`.*must be in \[0, 1\], got 1.5"),
    "threshold": (lambda: evaluate_until(len, 2, torch.arange(2), threshold=2), r"`threshold`.*in \[0, 1\], got 2"),
    "nobody": (lambda: evaluate_until(len, 0, torch.arange(2)), "`teachers` must be at least 1"),
    "buckets": (lambda: bucket_by_difficulty(torch.ones(2), 0), "`buckets` must be at least 1"),
    "rho": (lambda: correlation_filter(torch.ones(2, 2, 2), 0.0), r"`rho` must be in \(0, 1\]"),
    "one": (lambda: diversity(torch.ones(1, 2, 2), unbiased=True), "compares different teachers, but there is one"),
    "regions": (lambda: pairing_report(torch.ones(2, 2), torch.tensor([0, 5])), "must name one of 2 teachers"),
    "dt": (lambda: StudentCapability().update(0.1, -1.0), "`dt` must not be negative"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses(case):
    build, message = case
    with pytest.raises(ValueError, match=message):
        build()
