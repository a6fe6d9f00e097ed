import pytest
import torch

from lightning_distill.hardware import compute_latency, effective_throughput, roofline_latency, speedup


@pytest.mark.chapter("D46", api="lightning_distill.hardware.compute_latency")
def test_latency_is_the_golden_one(golden):
    case = golden("latency_model")
    ops, bits, peak = (case.inputs[name] for name in ("ops", "bits", "peak_ops_per_s"))
    dense = compute_latency(ops, bits, peak=peak)
    sparse = compute_latency(ops, bits, peak=peak, sparsity=case.inputs["sparsity"])
    assert dense.sum().item() == pytest.approx(case.expected["latency_s"], rel=case.rtol)
    assert sparse.sum().item() == pytest.approx(case.expected["latency_with_sparsity_s"], rel=case.rtol)
    ignored = compute_latency(ops, bits, peak=peak, sparsity=case.inputs["sparsity"], sparsity_efficiency=0.0)
    torch.testing.assert_close(ignored, dense)


@pytest.mark.chapter("D46", api="lightning_distill.hardware.roofline_latency")
def test_each_layer_waits_for_arithmetic_or_for_memory():
    # The first layer moves 0.4 GB at 20 GB/s, which takes longer than its 10 ms of arithmetic; the second 5 ms.
    got = roofline_latency([1e9, 2e9], [4e8, 1e8], peak=[1e11, 4e11], bandwidth=2e10)
    torch.testing.assert_close(got, torch.tensor([0.02, 0.005], dtype=torch.float64))
    bound = roofline_latency([1e9, 2e9], [0.0, 0.0], peak=[1e11, 4e11], bandwidth=2e10)
    torch.testing.assert_close(bound, torch.tensor([0.01, 0.005], dtype=torch.float64))


@pytest.mark.chapter("D48", api="lightning_distill.hardware.effective_throughput")
def test_throughput_falls_with_misses_and_stays_positive(golden):
    case = golden("cache_throughput")
    got = effective_throughput(case.inputs["peak"], miss_rate=case.inputs["miss_rate"], penalty=case.inputs["penalty"])
    torch.testing.assert_close(got, case.expected["corrected"], rtol=case.rtol, atol=case.atol)
    many = effective_throughput(1.0, miss_rate=torch.linspace(0, 1, 50), penalty=1000.0)
    assert (many > 0).all()
    assert (many.diff() < 0).all()
    assert many[0] == 1


@pytest.mark.erratum("ERR-66")
def test_printed_throughput_turns_negative(golden):
    case = golden("cache_throughput")
    printed = case.inputs["peak"] * (1 - case.inputs["miss_rate"] * case.inputs["penalty"])
    torch.testing.assert_close(printed, case.expected["as_written"], rtol=case.rtol, atol=1e-3)
    assert printed[-1] < 0


@pytest.mark.chapter("D49", api="lightning_distill.hardware.speedup")
def test_speedup_is_the_golden_one(golden):
    case = golden("speedup_table")
    torch.testing.assert_close(speedup(case.inputs["bits"]), case.expected["speedup"], rtol=case.rtol, atol=case.atol)


@pytest.mark.erratum("ERR-67")
def test_printed_speedups_leave_out_two_and_32_bits(golden):
    printed = {8: 4.0, 4: 8.0, 16: 2.0}
    assert all(speedup(bits).item() == factor for bits, factor in printed.items())
    assert set(golden("speedup_table").inputs["bits"].int().tolist()) - set(printed) == {2, 32}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: speedup([8, 0]), "`bits` must be positive and finite, got 0"),
        (lambda: speedup(float("nan")), "`bits` must be positive and finite, got nan"),
        (lambda: effective_throughput(1.0, miss_rate=1.5, penalty=1.0), r"`miss_rate` .* \[0, 1\], got 1.5"),
        (lambda: effective_throughput(1.0, miss_rate=0.5, penalty=-1.0), "`penalty` .* got -1"),
        (lambda: compute_latency([1.0, -2.0], 8, peak=1.0), "`ops` .* got -2"),
        (lambda: compute_latency(1.0, 8, peak=0.0), "`peak` must be positive and finite, got 0"),
        (lambda: compute_latency(1.0, 8, peak=1.0, sparsity=2.0), "`sparsity` .* got 2"),
        (lambda: compute_latency(1.0, 8, peak=1.0, sparsity_efficiency=2.0), "`sparsity_efficiency` .* got 2"),
        (lambda: roofline_latency(1.0, float("inf"), peak=1.0, bandwidth=1.0), "`bytes_moved` must be finite"),
        (lambda: roofline_latency(1.0, 1.0, peak=1.0, bandwidth=0.0), "`bandwidth` must be positive"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
