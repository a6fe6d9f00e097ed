import math

import pytest
import torch

from lightning_distill.outputs import Outputs, Step
from lightning_distill.weighting import (
    ExponentialDecay,
    LinearDecay,
    exponential_decay,
    linear_decay,
    performance_weights,
)


def at(progress):
    return Step(None, Outputs(torch.zeros(1, 2)), progress=progress)


@pytest.mark.chapter("B09", api="lightning_distill.weighting.linear_decay")
def test_linear_decay_is_the_golden_one(golden):
    case = golden("aux_decay_linear")
    found = [case.inputs["w"] * linear_decay(float(t), alpha=case.inputs["alpha"]) for t in case.inputs["t_over_T"]]
    assert found == pytest.approx(case.expected["w"].tolist(), rel=case.rtol)
    assert linear_decay(1.0, alpha=0.9) == pytest.approx(1 - 0.9)
    assert [LinearDecay(0.9)(at(t)) for t in (0.0, 0.5)] == [1.0, 0.55]


@pytest.mark.chapter("B10", api="lightning_distill.weighting.exponential_decay")
def test_exponential_decay_is_the_golden_one(golden):
    case = golden("aux_decay_exponential")
    found = [case.inputs["w"] * exponential_decay(float(t), beta=case.inputs["beta"]) for t in case.inputs["t_over_T"]]
    assert found == pytest.approx(case.expected["w"].tolist(), rel=case.rtol)
    assert ExponentialDecay(2.0)(at(0.5)) == pytest.approx(math.exp(-1))


@pytest.mark.chapter("B10")
@pytest.mark.erratum("ERR-35")
def test_exponential_decay_is_not_the_faster_one_at_the_same_constant(golden):
    for progress in torch.linspace(0, 1, 11).tolist():
        for constant in (0.3, 0.9, 1.0):
            assert exponential_decay(progress, beta=constant) >= linear_decay(progress, alpha=constant)
    assert exponential_decay(1.0, beta=1.0) == pytest.approx(0.368, abs=1e-3)
    assert linear_decay(1.0, alpha=1.0) == 0
    crossover = golden("aux_decay_exponential").expected["crossover_note_beta_for_linear_alpha_0_9"]
    assert -math.log(1 - 0.9) == pytest.approx(crossover)
    assert exponential_decay(1.0, beta=crossover) == pytest.approx(linear_decay(1.0, alpha=0.9))


@pytest.mark.chapter("B11", api="lightning_distill.weighting.performance_weights")
def test_performance_weights_are_the_golden_ones(golden):
    case = golden("aux_weight_performance")
    factors = performance_weights(case.inputs["acc_main"], case.inputs["acc_aux"].tolist())
    assert [case.inputs["w"] * f for f in factors] == pytest.approx(case.expected["w"].tolist(), rel=case.rtol)


@pytest.mark.chapter("B11")
@pytest.mark.erratum("ERR-36")
def test_the_printed_performance_ratio_is_no_decay():
    """As the heads catch up with the main classifier the factor falls to 1 and not below; the inverse rises to 1."""
    printed = [performance_weights(0.9, [accuracy])[0] for accuracy in (0.3, 0.6, 0.9)]
    assert printed == pytest.approx([3.0, 1.5, 1.0])
    inverse = [performance_weights(0.9, [accuracy], invert=True)[0] for accuracy in (0.3, 0.6, 0.9)]
    assert inverse == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_performance_weights_stay_within_the_largest_ratio():
    assert performance_weights(0.5, [0.0, 0.001, 1.0], max_ratio=4.0) == [4.0, 4.0, 0.5]
    assert performance_weights(0.5, [0.0, 0.001], invert=True, max_ratio=4.0) == [0.25, 0.25]
    assert performance_weights(0.0, [0.0, 0.5]) == [1.0, 0.2]
    assert performance_weights(0.0, [0.0, 0.5], invert=True) == [1.0, 5.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_decay(1.5), r"`progress` must be in \[0, 1\], got 1.5"),
        (lambda: linear_decay(0.5, alpha=1.1), r"`alpha` must be in \[0, 1\], got 1.1"),
        (lambda: LinearDecay(-0.1), r"`alpha` must be in \[0, 1\], got -0.1"),
        (lambda: exponential_decay(0.5, beta=-1.0), "`beta` must be finite and not negative, got -1.0"),
        (lambda: ExponentialDecay(math.nan), "`beta` must be finite and not negative, got nan"),
        (lambda: performance_weights(1.2, [0.5]), r"`main_accuracy` must be in \[0, 1\], got 1.2"),
        (lambda: performance_weights(0.5, [math.nan]), r"`head_accuracies` must be in \[0, 1\], got nan"),
        (lambda: performance_weights(0.5, [0.5], max_ratio=0.5), "`max_ratio` must be at least 1 and finite, got 0.5"),
    ],
)
def test_refuses_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
