"""Transposed convolutions: their output channels are in the second dimension, and of each group."""

import copy

import pytest
import torch
from torch import nn

from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    export_onnx,
    prepare,
    quantized_layers,
    read_packed,
    size_report,
    unprepare,
    write_packed,
)

LAYERS = {
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (5, 4, 7)),
    "2d in groups": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), stride=2, groups=2, dilation=(1, 2)), (5, 4, 6, 5)),
    "3d": (lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (2, 2, 3, 4, 3)),
}
CASES = pytest.mark.parametrize("kind", LAYERS)


def made(kind):
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    return nn.Sequential(build()), torch.randn(shape)


def each_channel(layer):
    """The weights that each output channel has, by what it does to an impulse of each input of its group."""
    per_group = layer.out_channels // layer.groups
    inputs = layer.in_channels // layer.groups
    rows = []
    for channel in range(layer.out_channels):
        group, own = divmod(channel, per_group)
        rows.append(layer.weight[group * inputs : (group + 1) * inputs, own].flatten())
    return torch.stack(rows)


@CASES
def test_each_output_channel_has_its_own_levels(kind):
    network, _ = made(kind)
    layer = prepare(network, QuantSpec(2))[0]
    rows = layer.rows(layer.weight).squeeze(1)
    assert torch.equal(rows, each_channel(layer))
    assert torch.equal(layer.from_rows(layer.rows(layer.weight)), layer.weight)
    with torch.no_grad():
        layer.weight.copy_(layer.quantized_weight())
    assert all(2 <= len(row.unique()) <= 4 for row in each_channel(layer))
    assert len(layer.weight.unique()) > 4


@CASES
@pytest.mark.parametrize("spec", [QuantSpec(8), QuantSpec(3, 8), QuantSpec(4, granularity="tensor")], ids=str)
def test_it_computes_as_the_plain_layer_with_rounded_weights_and_trains(kind, spec):
    network, x = made(kind)
    plain = copy.deepcopy(network)
    prepare(network, spec)
    calibrate(network, [x])
    layer = network[0]
    with torch.no_grad():
        plain[0].weight.copy_(layer.quantized_weight())
        torch.testing.assert_close(network(x), plain(layer.quantized_input(x)))
        size = [side + 1 for side in plain(x).shape[2:]] if kind.startswith("2d") else None
        torch.testing.assert_close(layer(x, size), plain[0](layer.quantized_input(x), size))
    network(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in network.parameters())
    assert type(unprepare(network)[0]) is type(plain[0])


@CASES
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_files_say_the_same(kind, granularity, tmp_path):
    network, x = made(kind)
    prepare(network, QuantSpec(3, granularity=granularity)).eval()
    write_packed(network, tmp_path / "packed.safetensors")
    again = read_packed(made(kind)[0], tmp_path / "packed.safetensors")
    torch.testing.assert_close(again(x), network(x), rtol=0, atol=1e-6)
    steps = network[0].out_channels if granularity == "channel" else 1
    assert size_report(network).layers[0].bytes == -(-network[0].weight.numel() * 3 // 8) + 4 * steps
    report = export_onnx(nn.Sequential(network, nn.Flatten()), x, tmp_path / "network.onnx")
    assert report.relative_error < 1e-5


def test_inputs_of_eight_bits_and_bits_of_channels(tmp_path):
    network, x = made("2d in groups")
    bits = (2, 8, 4, 4, 3, 2)
    prepare(network, QuantSpec(bits, 8))
    calibrate(network, [x])
    assert export_onnx(nn.Sequential(network, nn.Flatten()), x, tmp_path / "network.onnx").relative_error < 1e-5
    layer = quantized_layers(network)["0"]
    with torch.no_grad():
        layer.weight.copy_(layer.quantized_weight())
    assert all(len(row.unique()) <= 2**own for row, own in zip(each_channel(layer), bits, strict=True))
    with pytest.raises(ValueError, match="'0' has 6 output channels, but there are bits for 4"):
        prepare(made("2d in groups")[0], QuantSpec((2, 4, 4, 4)))
    with pytest.raises(ValueError, match="'0' has 12 weights per channel, which groups of 8 do not divide"):
        prepare(made("2d in groups")[0], QuantSpec(4, granularity="group:8"))
