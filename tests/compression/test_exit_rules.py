import math

import pytest
import torch
from scipy.stats import entropy

from lightning_distill.compression import (
    choose_thresholds,
    exit_confidence,
    exit_curve,
    exit_indices,
    exit_report,
    plot_exit_curve,
)


@pytest.mark.chapter("D44", api="lightning_distill.compression.exit_indices")
def test_the_first_sure_exit_is_taken_as_in_the_golden_case(golden):
    case = golden("early_exit")
    gates = case.inputs["gate_logits"].sigmoid()
    torch.testing.assert_close(gates, case.expected["gate"], rtol=case.rtol, atol=case.atol)
    taken = exit_indices(gates[:, :-1], [case.inputs["gamma"]] * 2)
    assert taken.tolist() == case.expected["exit_index"].long().tolist()
    assert case.inputs["exit_cost"][taken].mean().item() == pytest.approx(case.expected["mean_cost"])
    correct = torch.ones(3, 3, dtype=torch.bool)
    report = exit_report(gates[:, :-1], correct, case.inputs["exit_cost"].tolist(), [case.inputs["gamma"]] * 2)
    assert report.cost == pytest.approx(case.expected["mean_cost"])
    assert report.relative_cost == pytest.approx(2 / 3)
    assert report.shares == pytest.approx([1 / 3] * 3)


@pytest.mark.chapter("D44")
def test_nobody_passes_a_threshold_of_one_and_everybody_a_negative_one():
    confidences = torch.rand(50, 3)
    confidences[0] = 1.0
    assert (exit_indices(confidences, [1.0] * 3) == 3).all()
    assert (exit_indices(confidences, [math.inf] * 3) == 3).all()
    assert (exit_indices(confidences, [-1.0] * 3) == 0).all()
    assert (exit_indices(torch.full((2, 2), math.nan), [0.5, 0.5]) == 2).all()
    rising = [exit_indices(confidences, [level] * 3).double().mean() for level in torch.linspace(-0.1, 1, 12).tolist()]
    assert rising == sorted(rising)


def test_confidences_match_their_definitions():
    logits = 3 * torch.randn(20, 7, dtype=torch.float64)
    p = logits.softmax(-1)
    ordered = p.sort(-1, descending=True).values
    torch.testing.assert_close(exit_confidence(logits), ordered[:, 0])
    torch.testing.assert_close(exit_confidence(logits, "margin"), ordered[:, 0] - ordered[:, 1])
    expected = 1 - torch.from_numpy(entropy(p.numpy(), axis=-1)) / math.log(7)
    torch.testing.assert_close(exit_confidence(logits, "entropy"), expected)


@pytest.mark.parametrize("criterion", ["max_prob", "entropy", "margin"])
def test_confidences_are_between_zero_and_one_at_the_ends(criterion):
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [0.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
    for dtype in (torch.float32, torch.bfloat16):
        found = exit_confidence(logits.to(dtype), criterion)
        assert found.dtype == torch.float32
        assert ((found >= 0) & (found <= 1)).all()
        assert found[0] == 1
    assert (exit_confidence(torch.zeros(3, 1), criterion) == 1).all()


def some_data(samples=400, seed=0):
    """Three exits of which later ones are better, and confidences that say something about being right."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(samples, 3, generator=generator) < torch.tensor([0.7, 0.8, 0.9])
    noise = torch.rand(samples, 2, generator=generator)
    return 0.5 * noise + 0.5 * correct[:, :2], correct, [1.0, 2.0, 3.0]


def best_of_all(confidences, correct, costs, feasible, key):
    """The definition: every pair of thresholds between the samples' confidences."""
    levels = [[-1.0, *column.unique().tolist(), math.inf] for column in confidences.unbind(1)]
    reports = [exit_report(confidences, correct, costs, [a, b]) for a in levels[0] for b in levels[1]]
    return max((report for report in reports if feasible(report)), key=key)


@pytest.mark.parametrize("max_drop", [0.0, 0.02, 0.3])
def test_the_least_cost_is_found_for_a_loss_of_accuracy(max_drop):
    confidences, correct, costs = some_data(40)
    found = exit_report(confidences, correct, costs, choose_thresholds(confidences, correct, costs, max_drop=max_drop))
    assert found.accuracy >= found.full_accuracy - max_drop - 1e-12
    best = best_of_all(
        confidences, correct, costs, lambda r: r.accuracy >= r.full_accuracy - max_drop - 1e-9, lambda r: -r.cost
    )
    assert best.cost <= found.cost <= 1.05 * best.cost


@pytest.mark.parametrize("max_cost", [1.0, 1.7, 3.0])
def test_the_best_accuracy_is_found_for_a_cost(max_cost):
    confidences, correct, costs = some_data(40)
    found = exit_report(confidences, correct, costs, choose_thresholds(confidences, correct, costs, max_cost=max_cost))
    assert found.cost <= max_cost
    best = best_of_all(confidences, correct, costs, lambda r: r.cost <= max_cost, lambda r: r.accuracy)
    assert best.accuracy - 0.026 <= found.accuracy <= best.accuracy


def test_an_exit_that_only_loses_is_never_taken():
    confidences, correct, costs = torch.rand(200, 1), torch.ones(200, 2, dtype=torch.bool), [1.0, 2.0]
    correct[:, 0] = False
    assert choose_thresholds(confidences, correct, costs, max_drop=0.0) == [math.inf]
    report = exit_report(confidences, correct, costs, [math.inf], names=["blocks.1", "end"])
    assert report.never_taken == ("blocks.1",)
    assert math.isnan(report.accuracies[0])
    assert report.accuracy == report.full_accuracy == 1
    assert "never" in str(report)


def test_each_exit_gets_its_own_threshold():
    """The first is always sure and always wrong; no threshold for both would let anybody leave at the second."""
    confidences = torch.stack([torch.full((100,), 0.99), torch.linspace(0.1, 0.9, 100)], dim=1)
    correct = torch.ones(100, 3, dtype=torch.bool)
    correct[:, 0] = False
    correct[:50, 1] = False
    thresholds = choose_thresholds(confidences, correct, [1.0, 2.0, 3.0], max_drop=0.0)
    report = exit_report(confidences, correct, [1.0, 2.0, 3.0], thresholds)
    assert thresholds[0] == math.inf
    assert report.accuracy == 1
    assert report.shares[1] == pytest.approx(0.5, abs=0.01)


def test_thresholds_carry_over_to_other_samples():
    confidences, correct, costs = some_data(4000)
    thresholds = choose_thresholds(confidences, correct, costs, max_drop=0.02)
    calibrated = exit_report(confidences, correct, costs, thresholds)
    fresh, truth, _ = some_data(4000, seed=1)
    report = exit_report(fresh, truth, costs, thresholds)
    assert report.accuracy == pytest.approx(calibrated.accuracy, abs=0.025)
    assert report.cost == pytest.approx(calibrated.cost, rel=0.03)


def test_the_curve_goes_from_the_first_exit_to_the_whole_network(tmp_path):
    confidences, correct, costs = some_data()
    curve = exit_curve(confidences, correct, costs, points=9)
    assert curve[0].cost == 1
    assert curve[0].accuracy == correct[:, 0].double().mean()
    assert curve[-1].cost == 3
    assert curve[-1].accuracy == curve[-1].full_accuracy
    assert [point.cost for point in curve] == sorted(point.cost for point in curve)
    assert 3 <= len(curve) <= 9
    plot_exit_curve(curve, tmp_path / "plots" / "curve.png", chosen=curve[4])
    assert (tmp_path / "plots" / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_a_table():
    confidences, correct, costs = some_data()
    text = str(exit_report(confidences, correct, costs, [0.7, 0.5], names=["blocks.1", "blocks.3", "end"]))
    assert text.splitlines()[0].split() == ["exit", "threshold", "leave", "here", "accuracy", "there"]
    assert text.splitlines()[1].startswith("blocks.1     0.7000")
    assert "400 samples" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "Give exactly one of `max_drop` and `max_cost`, got None and None"),
        ({"max_drop": 0.1, "max_cost": 2.0}, "Give exactly one of `max_drop` and `max_cost`, got 0.1 and 2.0"),
        ({"max_drop": -0.1}, r"`max_drop` must be in \[0, 1\], got -0.1"),
        ({"max_cost": 0.5}, "`max_cost` is 0.5 operations per sample, but leaving at the cheapest exit takes 1"),
    ],
)
def test_refuses_goals_that_cannot_be_met(change, message):
    with pytest.raises(ValueError, match=message):
        choose_thresholds(*some_data(), **change)


def test_refuses_what_does_not_fit(tmp_path):
    confidences, correct, costs = some_data()
    with pytest.raises(ValueError, match="`thresholds` must be one number for each of the 2 exits, got 1"):
        exit_report(confidences, correct, costs, [0.5])
    with pytest.raises(ValueError, match=r"`correct` \(N, E \+ 1\) and `costs` E \+ 1 numbers, got"):
        exit_report(confidences, correct[:, :2], costs, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"with N > 0, .*\(0, 2\)"):
        exit_report(confidences[:0], correct[:0], costs, [0.5, 0.5])
    with pytest.raises(ValueError, match="`points` must be at least 2, got 1"):
        exit_curve(confidences, correct, costs, points=1)
    with pytest.raises(ValueError, match="`criterion` must be one of max_prob, entropy, margin, got 'gate'"):
        exit_confidence(torch.zeros(1, 2), "gate")
    with pytest.raises(ValueError, match="`curves` holds no point"):
        plot_exit_curve([], tmp_path / "curve.png")
