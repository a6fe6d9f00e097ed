"""Searches over the bits of layers that are quantized already."""

import copy

import pytest
import torch

from lightning_distill.bit_search import (
    PlanLoss,
    QuantizedWeights,
    divergence,
    fisher_errors,
    search_bits,
    squared_errors,
)
from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    full_precision,
    prepare,
    quantized_layers,
    set_alpha,
    set_bits,
    size_report,
)
from lightning_distill.tasks import Classification
from tests.bit_search.test_search import trained


def quantized(**spec):
    network, batches = trained()
    prepare(network, QuantSpec(**({"weights": 8, "activations": 8} | spec)), skip=["head"])
    calibrate(network, batches)
    with torch.no_grad():  # as if it had been trained
        for layer in quantized_layers(network).values():
            layer.log_weight_scale.add_(0.1)
    return network, batches


def test_a_plan_is_what_set_bits_makes_and_leaves_nothing_behind():
    network, batches = quantized()
    before = copy.deepcopy(network.state_dict())
    weights = QuantizedWeights(network, (2, 4, 8))
    loss = PlanLoss(network, weights, batches, Classification())
    assert weights.sizes == {"blocks.0.0": 72, "blocks.1.0": 96}
    plan = {"blocks.0.0": 8, "blocks.1.0": 2}
    set_alpha(network, 0.3)  # a ramp is under way
    found = loss(plan)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [layer.alpha for layer in quantized_layers(network).values()] == [0.3, 0.3]
    set_alpha(network, 1.0)
    x = torch.cat([batch[0] for batch in batches])
    with full_precision(network), torch.no_grad():
        own = network(x)
    set_bits(network, plan)  # the layer that keeps its 8 bits keeps its trained steps
    with torch.no_grad():
        assert found == pytest.approx(divergence(own, network(x)).mean().item(), rel=1e-4)


def test_fisher_takes_the_gradients_in_full_precision_and_each_layers_own_quantizer():
    network, batches = quantized()
    weights = QuantizedWeights(network, (2, 4))
    found = fisher_errors(network, weights, batches, Classification(), samples=16)
    set_bits(network, {"blocks.0.0": 2, "blocks.1.0": 4})
    with full_precision(network):
        again = fisher_errors(network, QuantizedWeights(network, (2, 4)), batches, Classification(), samples=16)
    assert found == again
    plain = squared_errors(weights)
    layer = quantized_layers(network)["blocks.0.0"]
    with torch.no_grad():
        expected = (layer.quantized_weight() - layer.weight).square().sum().item()
    assert plain["blocks.0.0"][2] == pytest.approx(expected, rel=1e-5)


def test_a_search_gives_a_plan_within_the_budget_of_the_size_report():
    network, batches = quantized()
    found = search_bits(network, batches, effective_bits=4.0, bits=(2, 3, 4, 8))
    set_bits(network, found.plan)
    assert size_report(network).average_bits == pytest.approx(found.effective_bits)
    assert found.effective_bits <= 4.0
    with pytest.raises(ValueError, match="must be 1 to 8 bits"):
        search_bits(network, batches, effective_bits=8, bits=(4, 12))
    with pytest.raises(ValueError, match="names 'head', which is no quantized layer of MLP"):
        search_bits(network, batches, effective_bits=4, layers=["head"])
    other, batches = quantized(weights="ternary")
    with pytest.raises(ValueError, match=r"The layer 'blocks\.0\.0' is ternary and has no bits to choose"):
        search_bits(other, batches, effective_bits=4)
