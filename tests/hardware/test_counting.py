import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_distill.hardware import count_costs, stored_bytes
from lightning_distill.hardware.counting import ROOT
from lightning_distill.quantization import QuantSpec, prepare, quantized_layers


def costs_of(model, batch, **arguments):
    return {cost.name: cost for cost in count_costs(model, batch, **arguments)}


class Functional(nn.Module):
    """Uses one layer twice, a function, and views."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        x = F.relu(self.layer(x))
        return (self.layer(x).t().reshape(4, -1) @ x).flatten()


@pytest.mark.chapter("D46", api="lightning_distill.hardware.count_costs")
def test_a_linear_layer_reads_inputs_and_weights_and_writes_outputs():
    (cost,) = count_costs(nn.Linear(6, 5), torch.zeros(3, 6))
    assert (cost.name, cost.kind, cost.calls) == (ROOT, "Linear", 1)
    assert cost.flops == 2 * 3 * 6 * 5
    assert cost.convolution_flops == 0
    assert cost.weight_bytes == 4 * (6 * 5 + 5)
    assert cost.activation_bytes == 4 * (3 * 6 + 3 * 5)
    assert cost.bytes == cost.weight_bytes + cost.activation_bytes


def test_a_convolution_has_two_operations_per_mac():
    (cost,) = count_costs(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(2, 3, 5, 5))
    assert cost.flops == cost.convolution_flops == 2 * (2 * 25 * 8) * (3 * 9)
    assert cost.padded_flops == 2 * (2 * 25 * 16) * (3 * 9)  # the channels of an image stay as they are
    assert cost.weight_bytes == 4 * 8 * 3 * 9
    assert cost.activation_bytes == 4 * (2 * 3 * 25 + 2 * 8 * 25)


@pytest.mark.parametrize(
    ("inputs", "outputs", "groups", "factor"),
    [
        (16, 32, 1, 1.0),
        (17, 16, 1, 32 / 17),
        (32, 32, 2, 1.0),
        (8, 8, 2, 4.0),
        (16, 16, 2, 4.0),
        (5, 16, 1, 3.2),
        (20, 20, 20, 32 / 20),
    ],
)
def test_channels_count_in_whole_blocks_of_each_group(inputs, outputs, groups, factor):
    (cost,) = count_costs(nn.Conv1d(inputs, outputs, 3, groups=groups), torch.zeros(1, inputs, 7))
    assert cost.padded_flops == pytest.approx(cost.convolution_flops * factor)


def test_what_is_no_layer_belongs_to_the_layer_around_it_and_views_cost_nothing():
    found = costs_of(Functional(), torch.zeros(2, 4))
    assert list(found) == [ROOT, "layer"]
    assert found["layer"].flops == 2 * (2 * 2 * 4 * 4)  # used twice
    assert found["layer"].weight_bytes == 2 * 4 * 16
    assert found[ROOT].calls == 2  # relu and the product
    assert found[ROOT].flops == 2 * 4 * 2 * 4
    assert found[ROOT].activation_bytes == 4 * ((8 + 8) + (8 + 8 + 16))


def test_attention_is_counted_although_it_is_a_function():
    width, length = 8, 5
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, dropout=0.0)
    found = costs_of(layer, torch.zeros(1, length, width))
    projections = 2 * length * width * (3 * width + width)
    attention = 2 * 2 * length * length * width
    assert found["self_attn"].flops == projections + attention
    assert found["linear1"].flops == 2 * length * width * 16
    assert found["norm1"].weight_bytes == 4 * 2 * width
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_quantized_layers_count_with_their_bits(bits):
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 8))
    plain = costs_of(model, torch.zeros(3, 16))
    size = stored_bytes(model)
    assert size == 4 * (128 + 64 + 8)
    prepare(model, QuantSpec(weights=bits), skip=["2"])
    found = costs_of(model, torch.zeros(3, 16))
    assert found["0"].weight_bytes == plain["0"].weight_bytes * bits / 32
    assert found["0"].activation_bytes == plain["0"].activation_bytes
    assert found["0"].flops == plain["0"].flops
    assert (found["0"].weight_bits, found["0"].compute_bits, found["0"].kind) == (bits, 32, "Linear")
    assert found["2"] == plain["2"]
    assert stored_bytes(model) == size - 4 * 128 + 128 * bits // 8 + 4 * 8  # and a step per channel


def test_arithmetic_is_as_wide_as_the_wider_of_weights_and_inputs():
    model = prepare(nn.Sequential(nn.Linear(4, 4)), QuantSpec(weights=4, activations=8))
    (cost,) = count_costs(model, torch.zeros(2, 4))
    assert (cost.weight_bits, cost.compute_bits) == (4, 8)
    half = nn.Linear(4, 4).bfloat16()
    (cost,) = count_costs(half, torch.zeros(2, 4, dtype=torch.bfloat16))
    assert (cost.weight_bits, cost.compute_bits, cost.weight_bytes) == (16, 16, 2 * 20)


def test_the_network_is_left_as_it_was():
    model = prepare(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), QuantSpec(weights=4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model[2].eval()
    count_costs(model, torch.randn(6, 4))
    assert [module.training for module in model] == [True, True, False]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(layer.enabled for layer in quantized_layers(model).values())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_pass_that_fails_leaves_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        count_costs(model, torch.zeros(2, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_batches_of_every_kind_are_read():
    model = nn.Linear(4, 2)
    batch = torch.zeros(3, 4)
    expected = count_costs(model, batch)
    assert count_costs(model, (batch, torch.zeros(3))) == expected
    assert count_costs(model, {"input": batch}) == expected
    assert count_costs(model, {"x": batch}, run=lambda network, given: network(given["x"])) == expected
