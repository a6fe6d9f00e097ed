"""The bound on what compression costs."""

import math

import pytest

from lightning_distill.diagnostics import implied_dimension, performance_bound


@pytest.mark.chapter("X8", api="lightning_distill.diagnostics.performance_bound")
def test_the_bound_is_that_of_the_golden_case(golden):
    case = golden("exercise8_bound")
    n, bits, expected = case.inputs["n"], case.inputs["bits"], case.expected
    found = [performance_bound(d, n, bits) for d in case.inputs["d"].tolist()]
    assert found == pytest.approx(expected["bound"].tolist(), rel=case.rtol, abs=case.atol)
    assert implied_dimension(0.02, n, bits) == pytest.approx(expected["d_implied_by_0_02"], rel=case.rtol)


@pytest.mark.chapter("X8", api="lightning_distill.diagnostics.implied_dimension")
@pytest.mark.parametrize("constants", [{}, {"c1": 0.3, "c2": 2.5}])
def test_the_dimension_is_the_inverse_and_the_bound_falls_with_data_and_bits(constants):
    for d in (0.0, 2.5, 400.0):
        bound = performance_bound(d, 1000, 4, **constants)
        assert implied_dimension(bound, 1000, 4, **constants) == pytest.approx(d, abs=1e-9)
    for falling in (
        [performance_bound(30, n, 4, **constants) for n in (10, 100, 1000, 10_000)],
        [performance_bound(30, 1000, b, **constants) for b in (2, 4, 8, 16)],
        [performance_bound(d, 1000, 4, **constants) for d in (900, 90, 9, 0)],
    ):
        assert falling == sorted(falling, reverse=True)
        assert len(set(falling)) == len(falling)
    c1, c2 = constants.get("c1", 1), constants.get("c2", 1)
    assert performance_bound(4, 100, 3, **constants) == pytest.approx(0.2 * c1 + c2 / 8)


@pytest.mark.erratum("ERR-71")
def test_the_printed_bound_needs_a_network_of_less_than_three_dimensions():
    d = implied_dimension(0.02, 10_000, 8)
    assert d == pytest.approx(2.59, abs=0.001)
    assert [round(performance_bound(d, 10_000, 8), 3) for d in (10, 100, 1000)] == [0.036, 0.104, 0.32]
    for before in (100, 1000):  # the smaller network of the exercise is in it only if somebody says what its d is
        assert performance_bound(before / 10, 10_000, 8) > 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10, 8), "`dimension` must be at least 0 and finite, got -1"),
        ((math.nan, 10, 8), "`dimension` must be at least 0 and finite, got nan"),
        ((1, 0, 8), "`samples` must be positive and finite, got 0"),
        ((1, 10, math.inf), "`bits` must be at least 0 and finite, got inf"),
    ],
)
def test_refuses_numbers_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        performance_bound(*arguments)


def test_refuses_bounds_that_rounding_alone_exceeds():
    with pytest.raises(ValueError, match=r"`bound` must be finite and at least 0.25, which is rounding alone, got 0.2"):
        implied_dimension(0.2, 100, 2)
    with pytest.raises(ValueError, match="`c1` must be positive, got 0"):
        implied_dimension(0.5, 100, 2, c1=0)
    with pytest.raises(ValueError, match="`c2` must be at least 0 and finite, got -1"):
        performance_bound(1, 100, 2, c2=-1)
