"""Weights from schedules, magnitudes and variances."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_distill.weighting import (
    StagedWeight,
    inverse_magnitude_weights,
    quantization_error_moments,
    quantization_loss_weight,
    staged_weight,
    variance_balanced_weight,
)

API = "lightning_distill.weighting."


def golden_schedule(case):
    i = case.inputs
    return StagedWeight(warm_up=i["T1"], middle=i["mid"], initial=i["init"], hold_until=i["T2"], decay=i["gamma"])


@pytest.mark.chapter("A60", api=API + "staged_weight")
def test_golden_schedule(golden):
    case = golden("staged_weight")
    schedule = golden_schedule(case)
    found = torch.tensor([schedule(step) for step in case.inputs["steps"].tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, case.expected["weights"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("A60", api=API + "StagedWeight")
def test_schedule_is_continuous_and_monotone_in_each_stage():
    schedule = StagedWeight(warm_up=100, middle=0.8, initial=0.1, hold_until=200, decay=0.02)
    values = [schedule(step / 10) for step in range(4000)]
    assert max(abs(b - a) for a, b in pairwise(values)) < 2e-3
    assert values[:1001] == sorted(values[:1001])
    assert set(values[1000:2000]) == {0.8}
    assert values[2000:] == sorted(values[2000:], reverse=True)
    assert StagedWeight(warm_up=0)(0) == 1.0
    assert StagedWeight(warm_up=5)(10**9) == 1.0


@pytest.mark.erratum("ERR-23")
def test_printed_warm_up_falls_to_zero_and_jumps(golden):
    case = golden("staged_weight_as_written")
    i = case.inputs

    def printed(t):
        if t < i["T1"]:
            return i["init"] * (1 + math.cos(math.pi * t / i["T1"])) / 2
        return i["mid"] * math.exp(-i["gamma"] * max(t - i["T2"], 0))

    found = torch.tensor([printed(t) for t in i["steps"].tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, case.expected["weights"], rtol=case.rtol, atol=case.atol)
    assert printed(i["T1"]) - printed(i["T1"] - 1e-9) == pytest.approx(case.expected["jump_at_T1"])
    ours = golden_schedule(golden("staged_weight"))
    assert ours(i["T1"]) - ours(i["T1"] - 1e-9) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warm_up": -1}, "`warm_up` must not be negative, got -1"),
        ({"initial": -0.1}, "`initial` must not be negative, got -0.1"),
        ({"middle": float("nan")}, "`middle` must not be negative, got nan"),
        ({"decay": -1.0}, "`decay` must not be negative"),
        ({"hold_until": 5}, "`hold_until` must not lie before the end of `warm_up`, 10, got 5"),
    ],
    ids=str,
)
def test_schedule_rejects_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        StagedWeight(**({"warm_up": 10} | change))
    with pytest.raises(ValueError, match="`step` must not be negative, got -1"):
        staged_weight(-1, warm_up=10)


def test_all_terms_contribute_the_same():
    magnitudes = torch.tensor([5.0, 0.01, 1.0], dtype=torch.float64)
    weights = inverse_magnitude_weights(magnitudes, total=1.0)
    contributions = weights * magnitudes
    torch.testing.assert_close(contributions, contributions.mean().expand(3))
    assert weights.sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="`magnitudes` must be positive, got"):
        inverse_magnitude_weights(torch.tensor([1.0, 0.0]))


@pytest.mark.chapter("X6", api=API + "variance_balanced_weight")
def test_exercise_6(golden):
    case = golden("exercise6_weights")
    i, expected = case.inputs, case.expected
    assert variance_balanced_weight(i["var_task"], i["var_distill"]) == pytest.approx(expected["lambda1"])
    mean, variance = quantization_error_moments(i["bits"], i["range"])
    assert mean == pytest.approx(expected["E_e2"])
    assert math.sqrt(variance / i["n"]) == pytest.approx(expected["std_of_mean_e2"])
    weight = quantization_loss_weight(i["var_task"], bits=i["bits"], value_range=i["range"], elements=i["n"])
    assert weight == pytest.approx(expected["lambda2_variance_balanced"], rel=case.rtol)


@pytest.mark.chapter("X6", api=API + "quantization_error_moments")
def test_squared_quantization_error_by_sampling():
    values = torch.rand(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
    step = 2 / (2**4 - 1)
    squared = ((values / step).round() * step - values) ** 2
    mean, variance = quantization_error_moments(4, 2.0)
    assert squared.mean().item() == pytest.approx(mean, rel=0.01)
    assert squared.var().item() == pytest.approx(variance, rel=0.01)


@pytest.mark.erratum("ERR-70")
def test_printed_weight_of_the_quantization_error_is_not_the_rule(golden):
    i = golden("exercise6_weights").inputs

    def ours(bits):
        return quantization_loss_weight(i["var_task"], bits=bits, value_range=i["range"], elements=i["n"])

    assert golden("exercise6_weights").expected["lambda2_chapter"] == 4 / 4  # printed: bits / 4
    assert ours(8) / ours(4) == pytest.approx(289)  # printed: 2
    # weighted, the losses fluctuate alike
    spread = math.sqrt(quantization_error_moments(8, i["range"])[1] / i["n"])
    assert ours(8) * spread == pytest.approx(math.sqrt(i["var_task"]))


def test_variances_reject_bad_values():
    with pytest.raises(ValueError, match="`variance` must be positive, got 0"):
        variance_balanced_weight(1.0, 0)
    with pytest.raises(ValueError, match="`reference_variance` must not be negative, got -1"):
        variance_balanced_weight(-1, 1.0)
    with pytest.raises(ValueError, match="`bits` must be positive, got 0"):
        quantization_error_moments(0, 1.0)
    with pytest.raises(ValueError, match="`elements` must be positive, got 0"):
        quantization_loss_weight(1.0, bits=4, value_range=1.0, elements=0)
