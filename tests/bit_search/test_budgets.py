"""Budgets in bits, bytes, seconds and joules."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_distill.bit_search import BitSearchResult, PlanLoss, RoundedWeights, search_bits
from lightning_distill.bit_search.budgets import Budget
from lightning_distill.hardware import CostModel, Kernel, count_costs
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec, calibrate, prepare, quantized_layers, set_bits
from lightning_distill.tasks import Classification

API = "lightning_distill.bit_search.search_bits"
MACHINE = CostModel(overhead=1e-6, throughput=1e9, bandwidth=1e8, speedups={8: 2.0, 4: 3.0})
BITS = (2, 4, 8)


@pytest.fixture
def network():
    return MLP((6, 12, 8, 3))


@pytest.fixture
def batches():
    return [(torch.randn(20, 6),), (torch.randn(30, 6),)]


def run(network, batch):
    return Classification().run(network, batch)


@pytest.mark.parametrize("quantity", ["latency", "energy"])
@pytest.mark.chapter("D46", api=API)
def test_the_best_plan_within_the_budget_costs_what_the_model_says_of_it(network, batches, quantity):
    layers = RoundedWeights(network, BITS).sizes

    def cost(plan):
        quantized = prepare(copy.deepcopy(network), overrides=plan)
        return getattr(MACHINE.estimate(quantized, batches[0], run=run), quantity)

    low, high = (cost(dict.fromkeys(layers, bits)) for bits in (2, 8))
    budget = low + 0.4 * (high - low)
    found = search_bits(
        network, batches, **{f"max_{quantity}": budget}, cost_model=MACHINE, bits=BITS, refinement="greedy"
    )
    assert found.cost == pytest.approx(cost(found.plan), rel=1e-9)
    assert found.cost <= budget
    assert found.unit == {"latency": "seconds", "energy": "joules"}[quantity]
    assert f"{found.unit} (budget {budget:g})" in str(found)
    loss = PlanLoss(network, RoundedWeights(network, BITS), batches, Classification())
    plans = [dict(zip(layers, bits, strict=True)) for bits in itertools.product(BITS, repeat=3)]
    assert found.loss <= 1.05 * min(loss(plan) for plan in plans if cost(plan) <= budget)


def test_seconds_of_a_machine_that_only_moves_weights_are_bytes(network, batches):
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.bias = None
    by_bytes = search_bits(network, batches, max_bytes=96, bits=BITS)
    moving = CostModel(bandwidth=1.0)
    rest = sum(cost.activation_bytes for cost in count_costs(network, batches[0], run=run))
    by_seconds = search_bits(network, batches, max_latency=rest + 96, cost_model=moving, bits=BITS)
    assert by_seconds.plan == by_bytes.plan
    assert by_seconds.cost - rest == pytest.approx(by_bytes.bytes)


def test_arithmetic_is_as_wide_as_weights_and_inputs_together(network, batches):
    prepare(network, QuantSpec(weights=8, activations=8))
    calibrate(network, batches)
    before = {name: layer.weight_scale.clone() for name, layer in quantized_layers(network).items()}
    costs = Budget(max_latency=1.0, cost_model=MACHINE).costs(network, batches[0], {"head": 24}, BITS, run)
    for bits, value in costs.table["head"].items():  # 4-bit weights do not make 8-bit inputs faster
        set_bits(network, {"head": bits})
        [head] = [cost for cost in count_costs(network, batches[0], run=run) if cost.name == "head"]
        assert value == MACHINE.latency(head)
        assert head.compute_bits == 8
    others = [cost for cost in count_costs(network, batches[0], run=run) if cost.name != "head"]
    assert costs.rest == pytest.approx(sum(map(MACHINE.latency, others)))
    set_bits(network, {"head": 8})
    assert all(layer.weight_scale.equal(before[name]) for name, layer in quantized_layers(network).items())


@pytest.mark.chapter("D46", api=API)
def test_a_calibration_of_integer_kernels_decides_with_its_times(network, batches, tmp_path):
    # 4-bit weights are the fastest ones, 2-bit weights slower than 8: the search must not take bits for seconds
    kernels = {
        "matrix": Kernel(overhead=9.0),
        "matrix, 8-bit weights": Kernel(overhead=4.0),
        "matrix, 4-bit weights": Kernel(overhead=1.0),
        "matrix, 2-bit weights": Kernel(overhead=5.0),
        "activation": Kernel(overhead=0.5),
        "view": Kernel(),
    }
    CostModel(kernels=kernels, runtime="onnx", start=0.25).save(tmp_path / "machine.json")
    settings = {"cost_model": tmp_path / "machine.json", "bits": BITS, "refinement": "greedy"}
    fast = search_bits(network, batches, max_latency=0.25 + 2 * 0.5 + 3, **settings)
    assert set(fast.plan.values()) == {4}
    assert fast.cost == pytest.approx(4.25)
    slower = search_bits(network, batches, max_latency=4.25 + 3, **settings)
    assert sorted(slower.plan.values()) == [4, 4, 8]
    prepare(network, overrides=slower.plan)
    assert slower.cost == pytest.approx(CostModel.load(tmp_path / "machine.json").estimate(network, batches[0]).latency)
    with pytest.raises(ValueError, match=r"`max_latency` is 4.2, but the cheapest plan needs 4.25"):
        search_bits(MLP((6, 12, 8, 3)), batches, max_latency=4.2, **settings)
    energy = Budget(max_energy=1.0, cost_model=tmp_path / "machine.json").costs(
        MLP((6, 12, 8, 3)), batches[0], {"head": 24}, BITS, run
    )
    assert energy.rest < 1e-3  # joules have no start


def test_quantized_inputs_let_all_bits_take_as_long(network, batches):
    prepare(network, QuantSpec(8, 8))
    calibrate(network, batches)
    kernels = {"matrix": Kernel(overhead=9.0), "matrix, int8": Kernel(overhead=2.0, weight_bandwidth=1e3)}
    machine = CostModel(kernels=kernels, runtime="onnx")
    costs = Budget(max_latency=1.0, cost_model=machine).costs(network, batches[0], {"head": 24}, BITS, run)
    assert len(set(costs.table["head"].values())) == 1
    assert costs.table["head"][2] == pytest.approx(2 + (8 * 3 + 3) / 1e3)


def test_a_result_comes_back_from_json_and_is_drawn(network, batches, tmp_path):
    found = search_bits(network, batches, max_latency=4.45e-7, cost_model="ideal", bits=BITS)
    again = BitSearchResult.from_dict(found.as_dict())
    assert again == found
    assert again.cost == found.cost
    found.write(tmp_path)
    assert (tmp_path / "bits.png").read_bytes().startswith(b"\x89PNG")


def test_bad_budgets_are_refused(network, batches):
    cases = {
        "Give exactly one budget of .*, got none": {},
        r"got \{'effective_bits': 4, 'max_latency': 1\}": {"effective_bits": 4, "max_latency": 1},
        "`max_energy` must be positive and finite, got -1": {"max_energy": -1, "cost_model": "ideal"},
        "`cost_model` belongs to .*, got None with `max_latency`": {"max_latency": 1},
        "`cost_model` belongs to .*, got 'ideal' with `max_bytes`": {"max_bytes": 100, "cost_model": "ideal"},
        r"must be one of \['compute', 'ideal'\] or a JSON file, got 'mine'": {"max_latency": 1, "cost_model": "mine"},
        "`max_latency` is 1e-09, but the cheapest plan needs": {"max_latency": 1e-9, "cost_model": "ideal"},
        "`max_latency` is 1, but without quantization it is": {"max_latency": 1, "cost_model": "ideal"},
        "`max_bytes` is 1000, but without quantization it is 768": {"max_bytes": 1000},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            search_bits(network, batches, **settings)
