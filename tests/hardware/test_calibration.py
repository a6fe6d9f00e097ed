import math

import pytest
import torch
from torch import nn

from lightning_distill.hardware import (
    CostModel,
    Kernel,
    LayerCost,
    Operation,
    calibrate_cost_model,
    calibration_workloads,
    count_costs,
    fit_cost_model,
    fit_kernels,
    measure_latency,
)

TRUTH = CostModel(overhead=5e-6, throughput=1e11, convolution_throughput=2e10, bandwidth=1e10, name="calibrated")


KERNELS = {
    "matrix": Kernel(overhead=4e-6, throughput=1.5e11, bandwidth=3e10, weight_bandwidth=2e10),
    "matrix, int8": Kernel(overhead=2e-6, throughput=1e12, bandwidth=2e10, weight_bandwidth=1e10),
    "function": Kernel(overhead=8e-6, bandwidth=1e10),
}


def seconds(model, counts):
    return model.start + sum(map(model.latency, counts))


def random_networks(number, seed=0):
    """Counts of networks of one to six layers, half of them with integers."""
    draw = torch.Generator().manual_seed(seed)

    def size(low, high):
        return int(10 ** (low + (high - low) * torch.rand((), generator=draw, dtype=torch.float64)))

    networks = []
    for index in range(number):
        bits, layers = (8, 8) if index % 2 else (32, None), []
        for _ in range(size(0, 0.8)):
            work = (Operation("matrix", size(4, 8), size(2, 6), float(size(3, 6))),)
            work += (Operation("function", 0, 0, float(size(3, 6))),) * size(0, 0.7)
            layers.append(LayerCost("", "", 1, weight_bits=bits[0], activation_bits=bits[1], operations=work))
        networks.append(layers)
    return networks


@pytest.mark.chapter("D46", api="lightning_distill.hardware.calibrate_cost_model")
def test_calibration_finds_the_constants_of_the_machine():
    calls = []

    def measure(network, batch):
        calls.append(network)
        return seconds(TRUTH, count_costs(network, batch)) * (100 if len(calls) <= len(work) else 1)  # cold at first

    work = calibration_workloads()
    found = calibrate_cost_model(work, measure=measure)
    assert len(calls) == 3 * len(work)
    for name in ("overhead", "throughput", "convolution_throughput", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-5)
    assert (found.name, found.runtime) == ("calibrated", "torch")
    assert set(found.kernels) == {
        "activation", "attention", "convolution by blocks", "convolution by columns", "function", "matrix", "vector",
        "view",
    }  # fmt: skip


@pytest.mark.chapter("D46", api="lightning_distill.hardware.fit_kernels")
@pytest.mark.parametrize(
    ("noise", "outliers", "tolerance"), [(0.0, 0, 1e-5), (0.03, 0, 0.1), (0.0, 12, 1e-3), (0.03, 12, 0.15)]
)
def test_a_fit_finds_the_constants_of_each_kernel(noise, outliers, tolerance):
    truth = CostModel(kernels=KERNELS, runtime="onnx", start=5e-6)
    networks = random_networks(200)
    draw = torch.Generator().manual_seed(1)
    times = [seconds(truth, each) * (1 + noise * torch.randn((), generator=draw).item()) for each in networks]
    times[:outliers] = [4 * value for value in times[:outliers]]
    found = fit_kernels(networks, times, runtime="onnx", name="x")
    assert found.kernels.keys() == KERNELS.keys()
    assert (found.runtime, found.name) == ("onnx", "x")
    assert found.start == pytest.approx(truth.start, rel=2 * tolerance)
    for name, kernel in KERNELS.items():
        got = found.kernels[name]
        assert got.throughput == pytest.approx(kernel.throughput, rel=tolerance), name
        assert got.bandwidth == pytest.approx(kernel.bandwidth, rel=2 * tolerance), name
        assert got.overhead == pytest.approx(kernel.overhead, rel=3 * tolerance), name
    new = random_networks(40, seed=2)
    errors = [abs(seconds(found, each) / seconds(truth, each) - 1) for each in new]
    assert max(errors) < tolerance
    assert fit_kernels(networks, times, runtime="torch").start == 0  # eager mode only starts operations


def test_a_few_wrong_times_do_not_move_the_rest():
    truth, networks = CostModel(kernels=KERNELS, runtime="onnx"), random_networks(60)
    times = [seconds(truth, each) * (4 if index < 6 else 1) for index, each in enumerate(networks)]
    found = fit_kernels(networks, times, runtime="onnx")
    errors = torch.tensor([seconds(found, each) / value - 1 for each, value in zip(networks, times, strict=True)])
    assert errors[6:].abs().max() < 0.02
    assert errors[:6].tolist() == pytest.approx([-0.75] * 6, abs=0.01)


def test_no_kernel_gets_a_negative_cost_whatever_the_times():
    networks = random_networks(40)
    times = torch.rand(40, generator=torch.Generator().manual_seed(0)).add(0.1).mul(1e-3).tolist()
    for kernel in fit_kernels(networks, times, runtime="onnx").kernels.values():
        assert min(kernel.seconds) >= 0


def test_constants_for_everything_come_from_the_networks_in_floating_point():
    networks = random_networks(40)
    for layers in networks:
        for layer in layers:
            layer.flops = sum(operation.flops for operation in layer.operations)
    times = [seconds(TRUTH, each) * (1 if index % 2 == 0 else 50) for index, each in enumerate(networks)]
    found = fit_kernels(networks, times, runtime="onnx")
    assert found.throughput == pytest.approx(TRUTH.throughput, rel=1e-6)
    with pytest.raises(ValueError, match="one time for each of at least 3 networks, got 2, 2"):
        fit_kernels(networks[:4], times[:4], runtime="onnx")


def test_nothing_gets_a_negative_cost():
    # Bytes that make it faster: the best cost of a byte that is not negative is none.
    layers = [
        [LayerCost("", "", calls=c, flops=f, activation_bytes=b)] for c, f, b in ((1, 4, 3), (2, 9, 1), (4, 2, 2))
    ]
    times = [c * 2 + f * 3 - b * 0.5 for c, f, b in ((1, 4, 3), (2, 9, 1), (4, 2, 2))]
    found = fit_cost_model(layers, times)
    assert found.bandwidth == math.inf
    assert found.convolution_throughput is None
    assert found.overhead > 0


def test_the_fit_is_of_relative_errors():
    # Two networks disagree about the cost of a call; the long one must not decide alone.
    layers = [[LayerCost("", "", calls=calls)] for calls in (1, 1000, 1000)]
    found = fit_cost_model(layers, [1.0, 2000.0, 2000.0])
    ratios = torch.tensor([1.0, 0.5, 0.5])
    assert found.overhead == pytest.approx((ratios.sum() / ratios.square().sum()).item())


def test_time_is_the_median_of_the_rounds_and_the_network_is_left_as_it_was():
    times = iter([0.0, 1.0, 10.0, 13.0, 20.0, 29.0])
    runs = []
    network = nn.Sequential(nn.BatchNorm1d(3))
    network.register_forward_hook(lambda module, inputs, output: runs.append(module[0].training))
    found = measure_latency(network, torch.zeros(2, 3), rounds=3, warmup=2, clock=lambda: next(times))
    assert found == 3.0
    assert runs == [False] * 5
    assert network[0].training
    assert measure_latency(network, torch.zeros(2, 3), rounds=1) > 0


def test_the_default_networks_tell_the_constants_apart():
    work = calibration_workloads()
    assert len(work) == 84
    sums = [[f(count_costs(*each)) for f in (calls, products, convolutions, moved)] for each in work]
    table = torch.tensor(sums, dtype=torch.float64)
    table = table / table.norm(dim=0)
    assert torch.linalg.cond(table) < 50


def calls(costs):
    return sum(cost.calls for cost in costs)


def products(costs):
    return sum(cost.flops - cost.convolution_flops for cost in costs)


def convolutions(costs):
    return sum(cost.padded_flops for cost in costs)


def moved(costs):
    return sum(cost.bytes for cost in costs)


def test_bad_input_is_refused():
    layer = [LayerCost("", "", calls=1)]
    with pytest.raises(ValueError, match="one time for each of at least 3 networks, got 2, 2"):
        fit_cost_model([layer] * 2, [1.0] * 2)
    with pytest.raises(ValueError, match="got 3, 4"):
        fit_cost_model([layer] * 3, [1.0] * 4)
    with pytest.raises(ValueError, match=r"`seconds` must be positive, got 0\.0"):
        fit_cost_model([layer] * 3, [1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"`seconds` must be positive, got -1\.0"):
        fit_kernels([layer] * 3, [1.0, -1.0, 1.0])
    kinds = ("vector", "matrix", "attention", "function")
    networks = [[LayerCost("", "", 1, operations=tuple(map(Operation, kinds)))]] * 3
    with pytest.raises(ValueError, match=r"3 times do not tell 4 kernels apart\. Measure more networks"):
        fit_kernels(networks, [1.0] * 3)
    assert len(fit_kernels([*networks, networks[0]], [1.0] * 4).kernels) == 4
    with pytest.raises(ValueError, match="`turns` must be positive, got 0"):
        calibrate_cost_model(turns=0)
    with pytest.raises(ValueError, match="`rounds` must be positive, got 0"):
        measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), rounds=0)
