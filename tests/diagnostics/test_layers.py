"""What the layers of a network know."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import mutual_info_score

from lightning_distill.diagnostics import (
    attention_distance_profile,
    ib_layer_importance,
    ib_layer_importance_from_joint,
    linear_probe_profile,
    norm_information,
)
from lightning_distill.diagnostics.bottleneck import _k_means
from lightning_distill.diagnostics.layer_profile import layer_profile

API = "lightning_distill.diagnostics."


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- profiles


def test_trend_is_spearmans_and_its_interval_decides():
    growing = torch.arange(5.0).double().unsqueeze(1) + 0.1 * features(5, 40)
    profile = layer_profile(growing)
    assert profile.best == 4
    assert profile.trend.value == pytest.approx(spearmanr(range(5), growing.mean(1)).statistic)
    assert profile.trend.verdict() == "supported"
    assert layer_profile(-growing).trend.verdict() == "refuted"
    assert layer_profile(features(5, 40)).trend.verdict() == "undecided"
    assert layer_profile(growing[:2]).trend.verdict() == "undecided"
    assert layer_profile(torch.ones(4, 3)).trend.value == 0.0
    tied = torch.tensor([1.0, 1.0, 2.0, 0.5, 2.0]).double().unsqueeze(1).expand(-1, 3)
    assert layer_profile(tied).trend.value == pytest.approx(spearmanr(range(5), tied[:, 0]).statistic)


# ---------------------------------------------------------------- probes


@pytest.mark.chapter("A21m", api=API + "linear_probe_profile")
def test_probe_reads_what_is_there_and_nothing_else():
    y = torch.arange(600) % 3
    clear = torch.nn.functional.one_hot(y, 3).double() @ features(3, 8, seed=1) + 0.05 * features(600, 8)
    noise = features(600, 8, seed=2)
    layers = [noise, clear + 3 * noise, clear]
    profile = linear_probe_profile([h[:300] for h in layers], y[:300], [h[300:] for h in layers], y[300:])
    chance, mixed, sure = (estimate.value for estimate in profile.layers)
    assert sure == 1.0
    assert abs(chance - 1 / 3) < 3 * math.sqrt(2 / 9 / 300)
    assert chance < mixed < sure
    assert profile.best == 2
    assert profile.trend.verdict() == "supported"
    assert profile.layers[0].n == 300


@pytest.mark.chapter("A21m")
def test_probe_of_numbers_is_ridge_regression():
    x, y = features(50, 4), features(50, seed=1) + 5
    x = x * torch.tensor([1.0, 10.0, 0.1, 1.0]) + 3
    y = y + x[:, 0]
    mean, spread = x[:30].mean(0), x[:30].std(0, unbiased=False)
    scaled = ((x - mean) / spread).numpy()
    ridge = Ridge(alpha=0.1 * 30).fit(scaled[:30], y[:30].numpy())
    found = linear_probe_profile([x[:30]], y[:30], [x[30:]], y[30:], ridge=0.1)
    assert found.layers[0].value == pytest.approx(ridge.score(scaled[30:], y[30:].numpy()))
    constant = linear_probe_profile([torch.ones(30, 2)], y[:30], [torch.ones(20, 2)], y[30:])
    assert constant.layers[0].value <= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], torch.arange(3), [], torch.arange(3)), "must hold the same layers, got 0 and 0"),
        (
            ([torch.ones(3, 2)], torch.arange(4), [torch.ones(3, 2)], torch.arange(3)),
            r"`hidden` must have shape \(4, d\) like its targets, got \(3, 2\)",
        ),
    ],
)
def test_probe_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_probe_profile(*arguments)
    with pytest.raises(ValueError, match="`ridge` must not be negative, got -1"):
        linear_probe_profile(*arguments, ridge=-1)


# ---------------------------------------------------------------- information


@pytest.mark.chapter("A26", api=API + "ib_layer_importance_from_joint")
def test_importance_matches_golden(golden):
    case = golden("ib_layer_importance")
    found = ib_layer_importance_from_joint(case.inputs["joint_F_Y"], case.inputs["joint_F_X"])
    assert found.about_target == pytest.approx(float(case.expected["I_FY"]))
    assert found.about_input == pytest.approx(float(case.expected["I_FX"]))
    assert found.importance == pytest.approx(float(case.expected["importance"]))
    assert found.lagrangian(float(case.inputs["beta"])) == pytest.approx(float(case.expected["ib_lagrangian"]))


@pytest.mark.chapter("A26", api=API + "ib_layer_importance")
def test_importance_of_clusters_is_their_information_over_their_entropy():
    y = torch.arange(400) % 4
    centres = 6 * torch.eye(4).double()
    layer = centres[y] + 0.1 * features(400, 4)
    found = ib_layer_importance(layer, y, clusters=4)
    assert found.about_target == pytest.approx(math.log(4))
    assert found.about_input == pytest.approx(math.log(4))
    assert found.importance == pytest.approx(1.0)
    assert found.chance < 0.05
    fine = ib_layer_importance(layer, y, clusters=16)
    assert fine.importance < found.importance  # cells within a class say nothing about it
    assert ib_layer_importance(layer, y, clusters=16) == fine
    cell = _k_means(layer, 16, torch.Generator().manual_seed(0))
    assert fine.about_target == pytest.approx(mutual_info_score(y, cell))
    noise = ib_layer_importance(features(400, 4, seed=3), y, clusters=16)
    assert 0 <= noise.importance <= noise.chance + 0.02
    shuffled = ib_layer_importance(layer, y[torch.randperm(400)], clusters=4)
    assert shuffled.importance < 0.05


def test_a_constant_layer_says_nothing_and_bad_input_is_refused():
    constant = ib_layer_importance(torch.ones(10, 2), torch.arange(10) % 2)
    assert (constant.about_input, constant.importance) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"got \(10,\) and \(10,\)"):
        ib_layer_importance(torch.ones(10), torch.zeros(10))
    with pytest.raises(ValueError, match="`clusters` must be positive, got 0"):
        ib_layer_importance(torch.ones(10, 2), torch.zeros(10), clusters=0)
    with pytest.raises(ValueError, match="`permutations` must not be negative, got -1"):
        ib_layer_importance(torch.ones(10, 2), torch.zeros(10), permutations=-1)
    with pytest.raises(ValueError, match="sums to 1, got a sum of 2"):
        ib_layer_importance_from_joint(torch.eye(2), torch.eye(2) / 2)
    with pytest.raises(ValueError, match="the same cells, got 2 and 1"):
        ib_layer_importance_from_joint(torch.eye(2) / 2, torch.ones(1, 1))


# ---------------------------------------------------------------- attention


@pytest.mark.chapter("A45", api=API + "attention_distance_profile")
def test_mean_distance_of_a_known_map():
    attention = torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]]]])
    profile = attention_distance_profile([attention])
    assert profile.distance.layers[0].value == pytest.approx(0.4)
    entropies = [-(p * np.log(p)).sum() for p in ([0.5, 0.5], [1.0], [0.2, 0.3, 0.5]) for p in [np.array(p)]]
    assert profile.entropy.layers[0].value == pytest.approx(np.mean(entropies))
    padded = attention_distance_profile([attention], mask=torch.tensor([[True, False, True]]))
    assert padded.distance.layers[0].value == pytest.approx((0.5 + 0.7) / 2)


@pytest.mark.chapter("A45")
def test_layers_that_look_further_and_further_support_the_claim():
    position = torch.arange(12.0)
    gap = (position[:, None] - position).abs()
    layers = [(-(gap / reach) + features(6, 2, 12, 12, seed=int(reach))).softmax(-1) for reach in (0.5, 1.0, 3.0, 8.0)]
    assert attention_distance_profile(layers).distance.trend.verdict() == "supported"
    assert attention_distance_profile(layers[::-1]).distance.trend.verdict() == "refuted"
    with pytest.raises(ValueError, match="at least one layer, got none"):
        attention_distance_profile([])
    with pytest.raises(ValueError, match=r"\(B, heads, T, T\), got \(2, 3\)"):
        attention_distance_profile([torch.ones(2, 3)])


# ---------------------------------------------------------------- norms


@pytest.mark.chapter("A42", "A43", api=API + "norm_information")
def test_length_says_something_before_the_norm_and_nothing_after():
    position = torch.arange(30.0).expand(4, 30)
    before = features(4, 30, 16) * (1 + position.unsqueeze(-1) / 10)
    after = torch.nn.functional.layer_norm(before, (16,))
    found = norm_information(before, after, position)
    expected = pearsonr(before.norm(dim=-1).flatten(), position.flatten())
    assert found.before.value == pytest.approx(expected.statistic)
    interval = expected.confidence_interval(0.95)
    assert (found.before.low, found.before.high) == pytest.approx((interval.low, interval.high))
    assert found.before.verdict() == "supported"
    assert found.variation_before > 0.2
    assert found.variation_after < 1e-4
    exact = norm_information(before, before / before.norm(dim=-1, keepdim=True), position)
    assert exact.after.verdict() == "undecided"
    mask = torch.zeros(4, 30, dtype=torch.bool)
    mask[0] = True
    assert norm_information(before, after, position, mask).before.n == 30
    with pytest.raises(ValueError, match="At least four tokens must count, got 3"):
        norm_information(before[0, :3], after[0, :3], position[0, :3])
    with pytest.raises(ValueError, match="one number per token"):
        norm_information(before, after, position[0])
