"""Corrected biases, against the closed form and the means themselves."""

import copy

import pytest
import torch
from torch import nn

from lightning_distill.bit_search import RoundedWeights
from lightning_distill.quantization import QuantSpec, calibrate, full_precision, prepare, quantized_layers
from lightning_distill.recovery import bias_correction, correct_bias

API = "lightning_distill.recovery."


@pytest.mark.chapter("D33", api=API + "bias_correction")
def test_correction_is_the_golden_one(golden):
    case = golden("bias_correction")
    w, w_q, x, b = (case.inputs[name] for name in ("W", "W_q", "x", "b"))
    found = b + bias_correction(w, w_q, x.mean(dim=0))
    torch.testing.assert_close(found, case.expected["b_corrected"], rtol=case.rtol, atol=case.atol)
    layer, original = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    for module, weight in ((layer, w_q), (original, w)):
        module.load_state_dict({"weight": weight, "bias": b})
    assert correct_bias(nn.Sequential(layer), [x], nn.Sequential(original)) == ["0"]
    torch.testing.assert_close(layer.bias.detach(), case.expected["b_corrected"], rtol=case.rtol, atol=case.atol)
    torch.testing.assert_close(
        (original(x) - layer(x)).mean(dim=0), case.expected["mean_error_after"], rtol=0, atol=1e-12
    )


@pytest.mark.erratum("ERR-63")
@pytest.mark.chapter("D33")
def test_printed_correction_leaves_the_error_of_another_quantizer_in_the_mean(golden):
    case = golden("bias_correction_as_written")
    w, w_q, x, b = (case.inputs[name] for name in ("W", "W_q", "x", "b"))
    rounded = (x @ w.T / case.inputs["out_scale"]).round().clamp(-2, 1) * case.inputs["out_scale"]
    printed = b + (rounded - x @ w_q.T).mean(dim=0)
    torch.testing.assert_close(printed, case.expected["b_corrected"], rtol=case.rtol, atol=case.atol)
    left = (x @ w_q.T + printed - (x @ w.T + b)).mean(dim=0)
    torch.testing.assert_close(left, case.expected["mean_error_after"], rtol=1e-6, atol=1e-9)
    ours = b + bias_correction(w, w_q, x.mean(dim=0))
    assert (x @ w_q.T + ours - (x @ w.T + b)).mean(dim=0).abs().max() < 1e-12


def convolutions(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, bias=bias), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )


def rounded_copy(network):
    quantized = copy.deepcopy(network)
    rounded = RoundedWeights(quantized, (2, 4))
    with rounded.applied(dict.fromkeys(rounded.sizes, 2)):
        state = copy.deepcopy(quantized.state_dict())
    quantized.load_state_dict(state)
    return quantized


def test_every_layer_has_the_original_layers_mean_for_its_own_inputs():
    original = convolutions()
    quantized = rounded_copy(original)
    x = torch.randn(64, 2, 12) + 0.5
    batches = [(x[:40], None), (x[40:], None)]
    before = (quantized(x) - original(x)).mean(dim=0).abs().max().item()
    assert correct_bias(quantized, batches, original) == ["0", "2", "5"]
    hidden = x
    for name, (ours, theirs) in enumerate(zip(quantized, original, strict=True)):
        if hasattr(ours, "weight"):
            error = (ours(hidden) - theirs(hidden)).movedim(1, 0).flatten(1).mean(dim=1)
            assert error.abs().max() < 1e-5, name
            assert torch.equal(ours.weight, rounded_copy(original)[name].weight)
        hidden = ours(hidden)
    assert (quantized(x) - original(x)).mean(dim=0).abs().max().item() < before
    assert not any(module._forward_hooks for module in quantized.modules())
    assert quantized.training


def test_layers_without_a_bias_are_left_alone_and_networks_without_one_refused():
    original = convolutions(bias=False)
    assert correct_bias(rounded_copy(original), [torch.randn(4, 2, 12)], original) == ["2", "5"]
    bare = nn.Sequential(nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match="no linear or convolution layer with a bias in common"):
        correct_bias(bare, [torch.randn(4, 3)], bare)
    with pytest.raises(ValueError, match="`batches` is empty"):
        correct_bias(original, [], original)
    with pytest.raises(ValueError, match=r"got \(2, 3\), \(2, 3\) and \(2,\)"):
        bias_correction(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2))


def test_a_prepared_network_is_compared_with_itself_in_full_precision():
    network = prepare(convolutions(), QuantSpec(weights=2, activations=4))
    x = torch.randn(64, 2, 12) + 0.5
    calibrate(network, [x])
    with full_precision(network), torch.no_grad():
        own = network(x)

    def off():
        with torch.no_grad():
            return (network(x) - own).mean(dim=0).abs().max().item()

    before = off()
    assert correct_bias(network, [x[:32], x[32:]]) == ["0", "2", "5"]
    assert off() < 0.5 * before
    assert all(layer.enabled for layer in quantized_layers(network).values())
    with pytest.raises(ValueError, match="has no quantized layer that could be compared with itself"):
        correct_bias(convolutions(), [x])
