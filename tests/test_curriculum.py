"""Formulas of curricula: difficulties, stages, probabilities, weights, benefit."""

import math

import pytest
import torch
from scipy import stats

from lightning_distill.curriculum import (
    SigmoidCurriculum,
    StagedCurriculum,
    adaptive_weight,
    select_probability,
    static_stage,
)
from lightning_distill.diagnostics import curriculum_benefit
from lightning_distill.outputs import Outputs, Step
from lightning_distill.sample_difficulty import TeacherDivergence, TeacherEntropy, WeightByDifficulty, per_sample


def step(student, teacher, **more):
    return Step(None, Outputs(student), Outputs(teacher), **more)


@pytest.mark.chapter("C01", api="lightning_distill.sample_difficulty.TeacherEntropy")
@pytest.mark.chapter("C02", api="lightning_distill.sample_difficulty.TeacherDivergence")
def test_difficulties_match_golden(golden):
    case = golden("difficulty_scores")
    now = step(case.inputs["p_student"].log(), case.inputs["p_teacher"].log())
    near = {"rtol": case.rtol, "atol": case.atol}
    torch.testing.assert_close(TeacherEntropy()(now), case.expected["entropy"], **near)
    torch.testing.assert_close(TeacherDivergence()(now), case.expected["divergence_reverse"], **near)
    torch.testing.assert_close(TeacherDivergence("forward")(now), case.expected["divergence_forward"], **near)


@pytest.mark.chapter("C02", api="lightning_distill.sample_difficulty.TeacherDivergence")
def test_divergence_orders_samples_and_is_zero_for_equals(golden):
    case = golden("curriculum_divergence_order")
    now = step(case.inputs["p_student"].log(), case.inputs["p_teacher"].log())
    difficulty = TeacherDivergence()(now)
    torch.testing.assert_close(difficulty, case.expected["reverse"], rtol=case.rtol, atol=case.atol)
    assert difficulty.argsort().tolist() == case.expected["easy_to_hard"].int().tolist()
    assert TeacherDivergence()(step(now.teacher.logits, now.teacher.logits)).abs().max() < 1e-9


@pytest.mark.chapter("C01", api="lightning_distill.sample_difficulty.TeacherEntropy")
def test_entropy_is_between_zero_and_that_of_the_uniform_distribution():
    logits = torch.cat([torch.zeros(1, 7), torch.eye(1, 7) * 1e4, 3 * torch.randn(50, 7)])
    difficulty = TeacherEntropy()(step(logits, logits))
    torch.testing.assert_close(difficulty[:2], torch.tensor([math.log(7), 0.0]))
    assert (difficulty >= 0).all()
    assert (difficulty <= math.log(7) + 1e-6).all()
    assert (TeacherEntropy(temperature=4.0)(step(logits, logits))[2:] > difficulty[2:]).all()


@pytest.mark.chapter("C03", api="lightning_distill.curriculum.StagedCurriculum")
def test_static_stages_match_golden(golden):
    case = golden("static_curriculum")
    thresholds = [float(case.inputs["theta1"]), float(case.inputs["theta2"])]
    stages = static_stage(case.inputs["d"], thresholds)
    assert stages.tolist() == case.expected["stage"].int().tolist()
    sizes = [int((stages <= stage).sum()) for stage in (1, 2, 3)]
    assert sizes == case.expected["cumulative_sizes"].int().tolist()


@pytest.mark.chapter("C03", api="lightning_distill.curriculum.StagedCurriculum")
def test_groups_come_in_at_their_starts_and_each_sample_is_in_one():
    difficulty = torch.randperm(90).double()
    curriculum = StagedCurriculum(starts=(0.2, 0.6))
    assert [curriculum(difficulty, progress).sum().item() for progress in (0.0, 0.19, 0.2, 0.59, 0.6, 1.0)] == [
        30, 30, 60, 60, 90, 90,
    ]  # fmt: skip
    assert (difficulty[curriculum(difficulty, 0.0) > 0] < 30).all()
    once = StagedCurriculum(starts=(0.2, 0.6), cumulative=False)
    groups = torch.stack([once(difficulty, progress) for progress in (0.0, 0.3, 0.9)])
    assert torch.equal(groups.sum(dim=0), torch.ones(90).double())
    assert (difficulty[groups[2] > 0] >= 60).all()


def test_an_empty_stage_is_refused():
    with pytest.raises(
        ValueError, match=r"Stage 1 of the curriculum has no samples: too many of the 5 samples are equal"
    ):
        StagedCurriculum()(torch.ones(5), 0.0)


@pytest.mark.chapter("C04", api="lightning_distill.curriculum.SigmoidCurriculum")
def test_selection_matches_golden(golden):
    case = golden("dynamic_curriculum")
    width = float(case.inputs["tau"])
    for limit, expected in zip(case.inputs["mu"], case.expected["p_select"], strict=True):
        probability = select_probability(case.inputs["d"], limit, width=width)
        torch.testing.assert_close(probability, expected, rtol=case.rtol, atol=case.atol)
        assert (probability.diff() < 0).all()  # the easier the likelier


@pytest.mark.erratum("ERR-45")
@pytest.mark.chapter("C04", api="lightning_distill.curriculum.select_probability")
def test_printed_selection_drops_the_easy_samples_and_in_the_end_all(golden):
    case = golden("dynamic_curriculum_as_written")
    width, difficulty = float(case.inputs["tau"]), case.inputs["d"]
    for limit, expected in zip(case.inputs["mu"], case.expected["p_select"], strict=True):
        printed = torch.sigmoid((difficulty - limit) / width)
        torch.testing.assert_close(printed, expected, rtol=case.rtol, atol=case.atol)
        assert (printed.diff() > 0).all()  # the easier the less likely
    assert printed.max() < 0.12
    assert select_probability(difficulty, 2.5, width=width).min() > 0.88


@pytest.mark.chapter("C04", api="lightning_distill.curriculum.SigmoidCurriculum")
def test_the_limit_moves_from_the_easiest_to_the_hardest():
    difficulty = torch.linspace(1.0, 3.0, 11)
    curriculum = SigmoidCurriculum(width=0.05, complete=0.5)
    for progress, sample in ((0.0, 0), (0.25, 5), (0.5, 10), (1.0, 10)):
        weights = curriculum(difficulty, progress)
        torch.testing.assert_close(weights[sample], torch.tensor(0.5).double())
        assert (weights[:sample] > 0.85).all()
        assert (weights[sample + 1 :] < 0.15).all()
    scaled = SigmoidCurriculum(width=0.05, complete=0.5)(100 * difficulty, 0.25)
    torch.testing.assert_close(scaled, curriculum(difficulty, 0.25))  # the unit of the difficulty does not matter
    assert torch.equal(curriculum(torch.ones(4), 0.3), torch.ones(4).double())


@pytest.mark.chapter("C05", api="lightning_distill.sample_difficulty.WeightByDifficulty")
def test_adaptive_weights_match_golden(golden):
    case = golden("adaptive_sampling_weight")
    weights = adaptive_weight(
        case.inputs["d"],
        case.inputs["p_student_max"],
        alpha=float(case.inputs["alpha"]),
        gamma=float(case.inputs["gamma"]),
    )
    torch.testing.assert_close(weights, case.expected["w"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("C05", api="lightning_distill.sample_difficulty.WeightByDifficulty")
def test_items_are_weighed_by_difficulty_where_the_student_is_not_sure():
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0], [9.0, 0.0]])
    student = torch.tensor([[0.1, 0.0], [9.0, 0.0], [0.1, 0.0]], requires_grad=True)
    weights = WeightByDifficulty(alpha=2.0)(step(student, teacher))
    torch.testing.assert_close(weights, torch.tensor([1 + 2 * math.log(2), 1.0, weights[2].item()]))
    assert 1 < weights[2] < 1.01
    assert not weights.requires_grad


def test_values_of_tokens_become_values_of_samples():
    values, logits = torch.tensor([1.0, 3.0, 5.0]), torch.zeros(3, 2)
    positions = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert per_sample(values, step(logits, logits, positions=positions, token_items=True)).tolist() == [2, 0, 5]
    assert per_sample(values, step(logits, logits)).tolist() == [1, 3, 5]
    grid, mask = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    assert per_sample(grid, step(logits, logits, mask=mask)).tolist() == [2, 5]
    assert per_sample(grid, step(logits, logits)).tolist() == [2, 7]


@pytest.mark.chapter("C06", api="lightning_distill.diagnostics.curriculum_benefit")
def test_benefit_of_identical_curves_is_none():
    errors = torch.rand(4, 3)
    report = curriculum_benefit(errors, errors, [1, 2, 3])
    assert [estimate.value for estimate in report.benefit] == [0, 0, 0]
    assert report.p_values == [1, 1, 1]
    assert math.isnan(report.slope)


@pytest.mark.chapter("C06", api="lightning_distill.diagnostics.curriculum_benefit")
def test_benefit_finds_a_planted_rate_and_agrees_with_scipy():
    times = [10, 20, 50, 100, 200, 500]
    noise = 1e-4 * torch.randn(6, len(times), generator=torch.Generator().manual_seed(1)).double()
    random = 0.5 + torch.rand(6, 1).double().expand(6, len(times))
    planted = 0.5 / torch.tensor(times).double().sqrt()
    report = curriculum_benefit(random - planted + noise, random, times)
    assert abs(report.slope + 0.5) < 0.05
    assert all(estimate.verdict() == "supported" for estimate in report.benefit)
    reference = stats.ttest_rel((random).numpy(), (random - planted + noise).numpy())
    for number, interval in enumerate(zip(*reference.confidence_interval(), strict=True)):
        estimate = report.benefit[number]
        assert (estimate.low, estimate.high) == pytest.approx(interval, rel=1e-6)
        assert report.p_values[number] == pytest.approx(reference.pvalue[number], rel=1e-6)


@pytest.mark.erratum("ERR-46")
@pytest.mark.chapter("C06", api="lightning_distill.diagnostics.curriculum_benefit")
def test_printed_rate_would_make_errors_negative():
    """A random order that learns at the rate 10 / t leaves no room for a benefit of 0.1 / sqrt(t)."""
    time = 1e5
    assert 10 / time - 0.1 / math.sqrt(time) < -2e-4


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`thresholds` must ascend, got \[1.0, 0.5\]"):
        static_stage(torch.ones(2), [1.0, 0.5])
    with pytest.raises(ValueError, match="`width` must be positive, got 0"):
        select_probability(torch.ones(2), 1.0, width=0.0)
    with pytest.raises(ValueError, match="`width` must be positive, got nan"):
        SigmoidCurriculum(width=float("nan"))
    with pytest.raises(ValueError, match=r"`complete` must be in \(0, 1\], got 0"):
        SigmoidCurriculum(complete=0)
    with pytest.raises(ValueError, match=r"`quantiles` must be in \(0, 1\), at least one, got \[0, 0.5\]"):
        StagedCurriculum(quantiles=(0, 0.5))
    with pytest.raises(ValueError, match=r"Each of the 1 `quantiles` needs a start .* got 2 `starts`"):
        StagedCurriculum(quantiles=(0.5,))
    with pytest.raises(ValueError, match="`alpha` must not be negative, got -1"):
        WeightByDifficulty(alpha=-1)
    with pytest.raises(ValueError, match=r"`gamma`, a probability, must be in \[0, 1\], got 2"):
        WeightByDifficulty(gamma=2)
    with pytest.raises(ValueError, match=r"Both errors must have the shape \(seeds, 2 times\), got \(3, 4\)"):
        curriculum_benefit(torch.ones(3, 4), torch.ones(3, 4), [1, 2])
    with pytest.raises(ValueError, match="at least two seeds, got 1"):
        curriculum_benefit(torch.ones(1, 2), torch.ones(1, 2), [1, 2])
