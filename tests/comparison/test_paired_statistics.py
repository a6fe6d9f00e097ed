import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lightning_distill.comparison.statistics import holm, mean_interval, paired_gain


@pytest.mark.parametrize("n", [2, 3, 5, 40])
@pytest.mark.parametrize("shift", [0.0, 0.5, -3.0])
def test_paired_gain_matches_scipy(n, shift):
    generator = np.random.default_rng(n)
    control = generator.normal(size=n)
    values = control + shift + generator.normal(size=n)
    expected = stats.ttest_rel(values, control)
    interval = expected.confidence_interval(0.95)
    found = paired_gain(values.tolist(), control.tolist())
    assert (found.t, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.gain == pytest.approx((values - control).mean())
    assert found.pairs == n
    expected_verdict = "better" if interval.low > 0 else "worse" if interval.high < 0 else "no difference shown"
    assert found.verdict == expected_verdict


def test_two_pairs_follow_the_cauchy_distribution():
    """Student's t with one degree of freedom: differences 1 and 3 have t = 2, p = 1 - 2 atan(2) / pi."""
    found = paired_gain([1.0, 3.0], [0.0, 0.0])
    assert found.t == pytest.approx(2.0)
    assert found.p == pytest.approx(1 - 2 / math.pi * math.atan(2))
    half = math.tan(math.pi * (0.975 - 0.5))
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ([0.01, 0.02, 0.03], "no difference shown"),
        ([0.02, 0.03, 0.025], "better"),
        ([-0.02, -0.03, -0.025], "worse"),
    ],
)
def test_verdict_is_whether_the_interval_contains_zero(gains, verdict):
    assert paired_gain(gains, [0.0] * 3).verdict == verdict


def test_what_all_seeds_share_does_not_count():
    """The paired test removes the spread between seeds, which an unpaired one would drown the gain in."""
    control = [0.1, 0.5, 0.9, 0.3]
    values = [value + gain for value, gain in zip(control, [0.010, 0.012, 0.011, 0.009], strict=True)]
    assert paired_gain(values, control).p < 0.001
    assert stats.ttest_ind(values, control).pvalue > 0.9


def test_equal_values_are_no_difference():
    found = paired_gain([0.5, 0.7, 0.6], [0.5, 0.7, 0.6])
    assert (found.gain, found.low, found.high, found.t, found.p) == (0.0, 0.0, 0.0, 0.0, 1.0)
    assert found.verdict == "no difference shown"


def test_gains_that_are_all_alike_are_not_tested():
    """0.8 - 0.7 and 0.4 - 0.3 are different floats: without a threshold t would be about 1e15."""
    found = paired_gain([0.8, 0.4, 0.2], [0.7, 0.3, 0.1])
    assert found.gain == pytest.approx(0.1)
    assert found.verdict == "not tested"
    assert all(map(math.isnan, (found.t, found.p, found.low, found.high)))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_are_not_tested(n):
    found = paired_gain([0.9] * n, [0.8] * n)
    assert found.verdict == "not tested"
    assert math.isnan(found.p)
    assert math.isnan(found.gain) == (n == 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_diverged_run_is_not_left_out(bad):
    found = paired_gain([0.9, bad, 0.9], [0.8, 0.8, 0.7])
    assert found.verdict == "diverged"
    assert math.isnan(found.gain)
    assert math.isnan(found.p)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one number per seed each, got 2 and 3"):
        paired_gain([1.0, 2.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_confidence_must_be_a_fraction(confidence):
    with pytest.raises(ValueError, match=r"`confidence` must be in \(0, 1\)"):
        mean_interval([1.0, 2.0], confidence=confidence)


def test_mean_interval_matches_scipy():
    values = [0.91, 0.94, 0.9, 0.93]
    found = mean_interval(values, confidence=0.9)
    expected = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.low, found.high) == pytest.approx(expected)
    assert found.sd == pytest.approx(np.std(values, ddof=1))


def closed_testing(p_values):
    """Adjusted p by its definition: the largest Bonferroni p of all sets of hypotheses that contain the one."""
    indices = range(len(p_values))
    sets = [chosen for size in indices for chosen in itertools.combinations(indices, size + 1)]
    return [
        max(min(1.0, len(chosen) * min(p_values[i] for i in chosen)) for chosen in sets if one in chosen)
        for one in indices
    ]


@pytest.mark.parametrize(
    "p_values", [[0.01], [0.01, 0.04, 0.03], [0.2, 0.001, 0.02, 0.02, 0.7], [0.5, 0.9], [0.0, 1.0, 0.04]]
)
def test_holm_is_the_closed_test_of_bonferroni(p_values):
    assert holm(p_values) == pytest.approx(closed_testing(p_values))


def test_holm_does_not_count_what_was_not_tested():
    adjusted = holm([0.01, math.nan, 0.04])
    assert math.isnan(adjusted[1])
    assert [adjusted[0], adjusted[2]] == pytest.approx([0.02, 0.04])
