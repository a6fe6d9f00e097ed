"""Thresholds, rules and the report of selective distillation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_distill.losses.term import reduce_items
from lightning_distill.outputs import Outputs, Step
from lightning_distill.selection import (
    SelectByClass,
    SelectByEntropy,
    SelectByPercentile,
    SelectByRunningPercentile,
    SelectByVariance,
    Selection,
    class_thresholds,
    dynamic_threshold,
    item_entropy,
    percentile_threshold,
    selection_report,
)
from lightning_distill.selection.histogram import BINS, count_entropies, histogram_quantile

ROOM = "lightning_distill.selection"
RULES = [
    lambda **a: SelectByEntropy(0.9, **a),
    lambda **a: SelectByPercentile(60.0, **a),
    lambda **a: SelectByRunningPercentile(60.0, **a),
    lambda **a: SelectByVariance(0.8, 1.0, **a),
    lambda **a: SelectByClass(3, 60.0, min_count=1, **a),
]
IDS = ["entropy", "percentile", "running", "variance", "class"]
STATEFUL = [RULES[2], RULES[3], RULES[4]]


def step_of(logits, labels=None, mask=None, teacher=None):
    teacher = Outputs(logits.detach() if teacher is None else teacher)
    return Step(batch=None, student=Outputs(logits), teacher=teacher, labels=labels, mask=mask)


def random_steps(count, items=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        step_of(2 * torch.randn(items, 3, generator=generator), torch.randint(0, 3, (items,), generator=generator))
        for _ in range(count)
    ]


def entropies(step):
    p = torch.softmax(step.student.logits.double(), -1).numpy()
    return -(p * np.log(p)).sum(-1)


@pytest.mark.chapter("B30", api=f"{ROOM}.SelectByEntropy")
def test_entropy_selection_matches_golden(golden):
    case = golden("selective_entropy")
    step = step_of(case.inputs["probs"].log())
    torch.testing.assert_close(item_entropy(step.student), case.expected["entropy"], rtol=case.rtol, atol=case.atol)
    weights = SelectByEntropy(case.inputs["threshold"])(step)
    assert (weights > 0).tolist() == case.expected["mask"].bool().tolist()
    losses = case.inputs["losses"]
    # the mean over the selected, as the golden number has it, and ours over all items
    assert ((losses * weights).sum() / weights.sum()).item() == pytest.approx(case.expected["loss"])
    assert reduce_items(losses, weights=weights).item() == pytest.approx(case.expected["loss"] * 2 / 3)
    exact = SelectByEntropy(case.inputs["threshold"], weight=3 / 2)(step)
    assert reduce_items(losses, weights=exact).item() == pytest.approx(case.expected["loss"])


@pytest.mark.chapter("B31", api=f"{ROOM}.percentile_threshold")
def test_percentile_matches_golden_and_numpy(golden):
    case = golden("selective_percentile")
    u = case.inputs["uncertainty"]
    threshold = percentile_threshold(u, case.inputs["q"])
    torch.testing.assert_close(threshold.item(), case.expected["threshold"], rtol=case.rtol, atol=case.atol)
    assert (u > threshold).tolist() == case.expected["selected"].bool().tolist()
    values = torch.randn(7, 31, dtype=torch.float64)
    mask = torch.rand(7, 31) > 0.4
    for q in (0, 3.7, 50, 99, 100):
        assert percentile_threshold(values, q).item() == pytest.approx(np.percentile(values.numpy(), q), rel=1e-12)
        expected = np.percentile(values[mask].numpy(), q)
        assert percentile_threshold(values, q, mask=mask).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.chapter("B32", api=f"{ROOM}.dynamic_threshold")
def test_dynamic_threshold_matches_golden_and_is_tau0_for_equal_items(golden):
    case = golden("selective_dynamic_threshold")
    found = dynamic_threshold(case.inputs["uncertainty"], tau0=case.inputs["tau0"], beta=case.inputs["beta"])
    torch.testing.assert_close(found.item(), case.expected["threshold"], rtol=case.rtol, atol=case.atol)
    assert dynamic_threshold(torch.full((9,), 0.3), tau0=0.5, beta=7.0).item() == 0.5
    assert dynamic_threshold(torch.tensor([0.0, 100.0]), tau0=0.5, beta=7.0, maximum=1.1).item() == pytest.approx(1.1)


@pytest.mark.chapter("B33", api=f"{ROOM}.class_thresholds")
def test_class_thresholds_match_golden_and_rare_classes_get_that_of_all(golden):
    case = golden("selective_class_balanced")
    u, labels = case.inputs["uncertainty"], case.inputs["labels"].long()
    found = class_thresholds(u, labels, 2, case.inputs["q"])
    torch.testing.assert_close(found, case.expected["thresholds"], rtol=case.rtol, atol=case.atol)
    assert (u > found[labels]).tolist() == case.expected["selected"].bool().tolist()
    labels[5:] = -100
    rare = class_thresholds(u, labels, 3, case.inputs["q"], min_count=2)
    assert rare[0].item() == pytest.approx(0.74)
    assert rare[1].item() == rare[2].item() == pytest.approx(np.percentile(u.numpy(), 80))


def test_nothing_to_select_from():
    empty, none = torch.empty(0), torch.zeros(4, dtype=torch.bool)
    assert percentile_threshold(empty).item() == math.inf
    assert percentile_threshold(torch.rand(4), mask=none).item() == math.inf
    assert dynamic_threshold(empty, tau0=0.5, beta=1.0).item() == 0.5
    assert class_thresholds(empty, empty.long(), 2).tolist() == [math.inf, math.inf]
    logits = torch.randn(4, 3, requires_grad=True)
    weights = SelectByEntropy(5.0)(step_of(logits))  # more than log 3: an empty selection
    loss = reduce_items(logits.square().sum(-1), weights=weights)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("q", [10.0, 50.0, 90.0, 99.0])
def test_quantile_of_a_histogram_is_that_of_the_values_within_a_bin(q):
    values = torch.rand(5000, dtype=torch.float64).pow(5) * 2.3  # most are tiny, as a sure network's
    found = histogram_quantile(count_entropies(values), q).item()
    assert found == pytest.approx(np.percentile(values.numpy(), q), rel=0.04)
    rows = torch.randint(0, 3, (5000,))
    by_row = histogram_quantile(count_entropies(values, rows, 4), q)
    for row in range(3):
        assert by_row[row].item() == pytest.approx(np.percentile(values[rows == row].numpy(), q), rel=0.06)
    assert by_row[3].item() == -math.inf


def test_histogram_takes_in_the_ends_of_the_range():
    counts = count_entropies(torch.tensor([0.0, 1e-9, 14.0, 99.0, 0.5]))
    assert counts.sum() == 5
    assert counts[0] == 2
    assert counts[BINS - 1] == 2


@pytest.mark.parametrize("make", RULES, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rules_give_finite_weights_of_the_items_shape_without_a_graph(make, dtype):
    logits = (1e4 * torch.randn(2, 5, 3)).to(dtype).requires_grad_()
    mask = torch.tensor([[True] * 5, [False] * 5])
    rule = make(weight=2.5)
    step = step_of(logits, torch.randint(0, 3, (2, 5)), mask)
    rule(step)
    rule.end_step(None)
    weights = rule(step_of(logits, torch.randint(0, 3, (2, 5)), mask))
    assert weights.shape == (2, 5)
    assert not weights.requires_grad
    assert set(weights.unique().tolist()) <= {0.0, 2.5}


@pytest.mark.parametrize("make", RULES, ids=IDS)
def test_keep_below_is_the_complement_of_keep_above_and_the_teacher_can_be_the_source(make):
    above, below, teacher = make(), make(keep="below"), make(source="teacher")
    for step in random_steps(3):
        swapped = step_of(torch.zeros_like(step.student.logits), step.labels, teacher=step.student.logits)
        weights, complement, of_teacher = above(step), below(step), teacher(swapped)
        if above.report() is not None or not isinstance(above, (SelectByRunningPercentile, SelectByClass)):
            torch.testing.assert_close(weights + complement, torch.ones_like(weights))
        torch.testing.assert_close(weights, of_teacher)
        for rule in (above, below, teacher):
            rule.end_step(None)


@pytest.mark.parametrize("make", STATEFUL, ids=IDS[2:])
def test_running_rules_choose_alike_however_a_step_is_split(make):
    whole, parts = make(), make()
    for step in random_steps(5):
        expected = whole(step)
        found = [
            parts(step_of(logits, labels))
            for logits, labels in zip(step.student.logits.split(7), step.labels.split(7), strict=True)
        ]
        assert torch.equal(torch.cat(found), expected)
        whole.end_step(None)
        parts.end_step(None)
    assert whole.report() == parts.report()
    assert 0 < whole.report().fraction < 1


@pytest.mark.parametrize("make", STATEFUL, ids=IDS[2:])
def test_two_processes_are_like_one_with_all_items(make):
    whole, halves = make(), [make(), make()]
    steps = random_steps(3)
    # each process sees the mean of both
    for step in steps:
        expected = whole(step)
        parts = zip(step.student.logits.chunk(2), step.labels.chunk(2), strict=True)
        found = [rule(step_of(*part)) for rule, part in zip(halves, parts, strict=True)]
        assert torch.equal(torch.cat(found), expected)
        whole.end_step(None)
        merged = {name: sum(dict(rule.named_buffers())[name] for rule in halves) for name in ("_seen",)}
        for rule in halves:
            rule._seen.copy_(merged["_seen"])
            rule.end_step(None)


def test_running_percentile_takes_the_share_that_was_asked_for():
    rule = SelectByRunningPercentile(80.0)
    fractions = []
    for step in random_steps(30, items=400):
        fractions.append((rule(step) > 0).float().mean().item())
        rule.end_step(None)
    assert fractions[0] == 1.0
    assert np.mean(fractions[1:]) == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("make", STATEFUL, ids=IDS[2:])
def test_older_steps_count_less_and_less(make):
    rule = make(momentum=0.5)
    for step in random_steps(3, items=40):
        rule(step)
        rule.end_step(None)
    counts = rule.sums[:1] if isinstance(rule, SelectByVariance) else rule.histogram
    assert counts.sum().item() == pytest.approx(40 * (1 + 0.5 + 0.25))


def test_running_percentile_forgets():
    rule = SelectByRunningPercentile(50.0, momentum=0.5)
    sure, unsure = 20 * torch.eye(3), 0.1 * torch.eye(3)
    for logits in [sure] * 3 + [unsure] * 12:
        rule(step_of(logits))
        rule.end_step(None)
    assert histogram_quantile(rule.histogram, 50.0).item() == pytest.approx(math.log(3), rel=0.05)


def test_variance_rule_uses_the_variance_of_the_steps_before():
    rule = SelectByVariance(0.5, 2.0, momentum=0.0)
    first, second = random_steps(2)
    assert torch.equal(rule(first), torch.from_numpy(entropies(first) > 0.5).float())  # no variance yet
    rule.end_step(None)
    threshold = 0.5 * (1 + 2.0 * entropies(first).var())
    assert 0.5 < threshold < math.log(3)
    assert torch.equal(rule(second), torch.from_numpy(entropies(second) > threshold).float())


def test_class_rule_keeps_the_same_share_of_every_class():
    """Class 0 is easy: a threshold for all would never choose it."""
    generator = torch.Generator().manual_seed(0)
    balanced, plain = SelectByClass(3, 70.0), SelectByRunningPercentile(70.0)
    for step in range(20):
        labels = torch.randint(0, 3, (300,), generator=generator)
        logits = torch.randn(300, 3, generator=generator) + 8 * (labels == 0)[:, None] * torch.eye(3)[0]
        for rule in (balanced, plain):
            rule(step_of(logits, labels))
            rule.end_step(None)
            if step == 0:
                rule.reset()  # every item of the first step is chosen
    fair, unfair = balanced.report(), plain.report()
    assert fair.class_fractions == pytest.approx((0.3, 0.3, 0.3), abs=0.05)
    assert fair.balanced
    assert unfair.class_fractions[0] < 0.02
    assert not unfair.balanced


def test_items_without_a_label_have_the_class_that_the_teacher_decides():
    rule = SelectByClass(2, 50.0, min_count=1)
    labels = torch.tensor([0, -100, -100, 1])
    teacher = torch.tensor([[0.0, 9.0], [9.0, 0.0], [0.0, 9.0], [0.0, 9.0]])
    step = step_of(torch.randn(4, 2), labels, teacher=teacher)
    assert rule._rows(step, torch.zeros(4)).tolist() == [0, 0, 1, 1]
    alone = Step(batch=None, student=Outputs(torch.randn(4, 2)), labels=labels)
    assert rule._rows(alone, torch.zeros(4)).tolist() == [0, 2, 2, 1]


def test_evaluation_neither_moves_a_rule_nor_counts():
    rule = SelectByRunningPercentile(50.0).eval()
    rule(random_steps(1)[0])
    rule.end_step(None)
    assert rule.report() is None
    assert not rule.histogram.any()


def test_logits_that_do_not_exist_yet_keep_their_gradient():
    hidden, layer = torch.randn(6, 4, requires_grad=True), nn.Linear(4, 3)
    late = Outputs(hidden=hidden, head=layer)
    torch.testing.assert_close(item_entropy(late), item_entropy(Outputs(layer(hidden))))
    assert not late.has_logits
    opaque = Outputs(hidden=hidden, head=lambda h: layer(h))  # only the call tells its logits
    SelectByEntropy(0.5)(Step(batch=None, student=opaque))
    assert opaque.logits.requires_grad


def test_report_counts_what_the_definition_counts():
    selected = torch.tensor([True, True, False, True, False, True])
    labels = torch.tensor([0, 0, 1, 1, -100, -100])
    mask = torch.tensor([True, True, True, True, True, False])
    report = selection_report(selected, labels, 3, mask=mask, metric=0.9, teacher_flops=10.0)
    assert report.n == 5
    assert report.fraction == pytest.approx(3 / 5)
    assert report.class_fractions[:2] == (1.0, 0.5)
    assert math.isnan(report.class_fractions[2])
    expected = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(3)
    assert report.balance == pytest.approx(expected)
    assert report.metric_per_flop == pytest.approx(0.9 / 30)
    nothing = selection_report(torch.zeros(3, dtype=torch.bool), metric=0.9, teacher_flops=1.0)
    assert nothing.fraction == 0
    assert math.isnan(nothing.balance)
    assert math.isnan(nothing.metric_per_flop)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectByEntropy(-1.0), "`threshold` must not be negative, got -1.0"),
        (lambda: SelectByEntropy(math.nan), "`threshold` must not be negative, got nan"),
        (lambda: SelectByEntropy(0.5, source="both"), "`source` must be 'student' or 'teacher', got 'both'"),
        (lambda: SelectByEntropy(0.5, keep="most"), "`keep` must be 'above' or 'below', got 'most'"),
        (lambda: SelectByEntropy(0.5, weight=0.0), "`weight` must be positive, got 0.0"),
        (lambda: SelectByPercentile(101), r"must be in \[0, 100\], got 101"),
        (lambda: SelectByRunningPercentile(momentum=1.0), r"`momentum` must be in \[0, 1\), got 1.0"),
        (lambda: SelectByVariance(beta=-1.0), "`beta` must not be negative"),
        (lambda: SelectByClass(0), "`classes` must be at least 1, got 0"),
        (lambda: class_thresholds(torch.rand(3), torch.zeros(2).long(), 2), "must have the same shape"),
        (lambda: selection_report(torch.ones(3).bool(), torch.zeros(2).long(), 2), "`selected` and `labels`"),
        (lambda: selection_report(torch.ones(3).bool(), metric=1.0, teacher_flops=0.0), "`teacher_flops`"),
        (lambda: SelectByClass(2)(random_steps(1)[0]), "`classes` of SelectByClass is 2, but an item has the class 2"),
        (lambda: SelectByClass(2)(Step(None, Outputs(torch.randn(2, 2)))), "needs labels or a teacher"),
        (lambda: SelectByEntropy(0.5, source="teacher")(Step(None, Outputs(torch.randn(2, 2)))), "there is no teacher"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_selection_needs_a_bound():
    with pytest.raises(TypeError, match=r"without a `bound\(entropy, step\)`"):
        Selection()(random_steps(1)[0])
