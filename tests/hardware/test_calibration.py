import math

import pytest
import torch
from torch import nn

from lightning_distill.hardware import (
    CostModel,
    LayerCost,
    calibrate_cost_model,
    calibration_workloads,
    count_costs,
    fit_cost_model,
    measure_latency,
)

TRUTH = CostModel(overhead=5e-6, throughput=1e11, convolution_throughput=2e10, bandwidth=1e10, name="calibrated")


def seconds(model, counts):
    return sum(map(model.latency, counts))


@pytest.mark.chapter("D46", api="lightning_distill.hardware.calibrate_cost_model")
def test_calibration_finds_the_constants_of_the_machine():
    found = calibrate_cost_model(measure=lambda network, batch: seconds(TRUTH, count_costs(network, batch)))
    for name in ("overhead", "throughput", "convolution_throughput", "bandwidth"):
        assert getattr(found, name) == pytest.approx(getattr(TRUTH, name), rel=1e-5)
    assert found.name == "calibrated"


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
    assert len(work) == 30
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
    with pytest.raises(ValueError, match="`rounds` must be positive, got 0"):
        measure_latency(nn.Linear(2, 2), torch.zeros(1, 2), rounds=0)
