"""Layers whose output channels have bits of their own; what each channel does is what a layer of its bits would do."""

import copy

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from lightning_distill import QADModule
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.networks import MLP
from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    export_onnx,
    full_precision,
    integer_linear,
    integer_weight,
    prepare,
    quantized_layers,
    read_packed,
    set_bits,
    size_report,
    to_torchao,
    unprepare,
    write_packed,
)

BITS = (8, 2, 4, 2, 3, 8)
SPECS = [
    {},
    {"activations": 8},
    {"scheme": "seq"},
    {"scheme": "lsq"},
    {"scheme": "fixed"},
    {"scheme": "minmax"},
    {"gradient": "dsq"},
    {"granularity": "group:4"},
]


def linear(rows=6, columns=16):
    return nn.Sequential(nn.Linear(columns, rows))


@pytest.mark.parametrize("settings", SPECS, ids=str)
def test_each_channel_is_quantized_and_trained_as_in_a_layer_of_its_bits(settings):
    network, x, towards = linear(), torch.randn(40, 16), torch.randn(40, 6)
    several = prepare(copy.deepcopy(network), QuantSpec(BITS, **settings))
    calibrate(several, [x])
    output = several(x)
    output.backward(towards)
    assert len(several[0].quantized_weight()[0].unique()) > 7
    for bits in set(BITS):
        channels = [channel for channel, own in enumerate(BITS) if own == bits]
        single = prepare(copy.deepcopy(network), QuantSpec(bits, **settings))
        calibrate(single, [x])
        expected = single(x)
        expected.backward(towards)
        assert torch.equal(several[0].quantized_weight()[channels], single[0].quantized_weight()[channels])
        torch.testing.assert_close(output[:, channels], expected[:, channels])
        torch.testing.assert_close(several[0].effective_scale()[channels], single[0].effective_scale()[channels])
        for (name, own), other in zip(several[0].named_parameters(), single[0].parameters(), strict=True):
            if own.ndim > 0:  # of a step of the input or a sharpness all channels have a share
                torch.testing.assert_close(own.grad[channels], other.grad[channels], msg=name)


def test_the_same_bits_in_all_channels_are_the_bits_of_the_layer():
    layer = prepare(linear(), QuantSpec((4,) * 6))[0]
    assert layer.bits == 4
    layer.set_bits([2, 4, 4, 4, 4, 4])
    assert (layer.bits, layer.weight_bits, layer.mean_weight_bits) == ((2, 4, 4, 4, 4, 4), 4, 22 / 6)
    layer.set_bits([8] * 6)
    assert (layer.bits, layer.weight_bits, layer.mean_weight_bits) == (8, 8, 8.0)


def test_one_bit_beside_others_is_trained_and_has_no_zero():
    network = prepare(linear(), QuantSpec((1, 1, 4, 4, 8, 8)))
    network(torch.randn(7, 16)).sum().backward()
    steps = network[0].log_weight_scale.grad
    assert steps.isfinite().all()
    assert steps[:2].abs().min() > 0
    assert len(network[0].quantized_weight()[0].unique()) == 2
    assert not network[0].weight_grid.has_zero
    network[0].set_bits((3, 4, 4, 4, 8, 8))
    assert network[0].weight_grid.has_zero


def test_tables_read_the_levels_of_their_rows():
    table = prepare(nn.Sequential(nn.Embedding(6, 8)), QuantSpec(BITS))
    ids = torch.tensor([[1, 2, 2], [0, 5, 1]])
    out = torch.randn(2, 3, 8)
    vectors = table(ids)
    assert torch.equal(vectors, table[0].quantized_weight()[ids])
    vectors.backward(out)
    steps = table[0].log_weight_scale.grad.clone()
    table.zero_grad()
    table[0].quantized_weight()[ids].backward(out)
    torch.testing.assert_close(steps, table[0].log_weight_scale.grad)


def test_plans_of_channels_change_no_parameter_and_leave_no_trace():
    network, x = linear(), torch.randn(5, 16)
    before = copy.deepcopy(network)
    prepare(network, QuantSpec(4))
    parameters = {name: (p, p.shape) for name, p in network.named_parameters()}
    keys = list(network.state_dict())
    set_bits(network, {"0": BITS})
    assert {name: (p, p.shape) for name, p in network.named_parameters()} == parameters
    assert list(network.state_dict()) == keys
    assert not torch.equal(network(x), before(x))
    with full_precision(network):
        assert torch.equal(network(x), before(x))
    unprepare(network)
    assert torch.equal(network(x), before(x))
    assert list(network.state_dict()) == list(before.state_dict())
    assert not list(network.buffers())


def test_checkpoints_keep_the_bits_of_channels():
    network, x = prepare(linear(), QuantSpec(8, 8), overrides={"0": QuantSpec(BITS, 8)}), torch.randn(9, 16)
    calibrate(network, [x])
    for again in (prepare(linear(), QuantSpec(8, 8)), prepare(linear(), QuantSpec(BITS[::-1], 8))):
        again.load_state_dict(network.state_dict())
        assert again[0].bits == BITS
        assert torch.equal(again(x), network(x))
    plain = prepare(linear(), QuantSpec(8, 8))
    calibrate(plain, [x])
    again.load_state_dict(plain.state_dict())
    assert again[0].bits == 8
    assert torch.equal(again(x), plain(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_take_the_levels_with_them(dtype):
    network = prepare(linear(), QuantSpec(BITS)).to(dtype)
    output = network(torch.randn(3, 16, dtype=dtype))
    output.sum().backward()
    assert output.dtype == dtype
    assert all(p.grad.isfinite().all() for p in network.parameters())
    codes = integer_weight(network[0]).codes
    assert [int(row.abs().max()) <= 2 ** (bits - 1) for row, bits in zip(codes, BITS, strict=True)] == [True] * 6


class Picture(nn.Module):
    """A convolution, a table and a linear layer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(6, 9)
        self.plane = nn.Conv2d(1, 6, 2)
        self.head = nn.Linear(24, 6)

    def forward(self, tokens):
        return self.head(self.plane(self.table(tokens).reshape(-1, 1, 3, 3)).relu().flatten(1))


@pytest.mark.parametrize("scheme", ["auto", "minmax"])
def test_packed_files_have_the_bits_of_each_channel_and_say_the_same(tmp_path, scheme):
    tokens = torch.arange(6)
    network = prepare(Picture(), QuantSpec(BITS, scheme=scheme)).eval()
    write_packed(network, tmp_path / "packed.safetensors")
    again = read_packed(Picture(), tmp_path / "packed.safetensors")
    torch.testing.assert_close(again(tokens), network(tokens), rtol=0, atol=1e-6 if scheme == "minmax" else 0.0)
    assert [layer.bits for layer in quantized_layers(again).values()] == [BITS] * 3
    report = size_report(network)
    assert report.average_bits == pytest.approx(sum(BITS) / 6)
    per_channel = {"table": 9, "plane": 4, "head": 24}
    for layer in report.layers:
        two, three, four, eight = (-(-BITS.count(b) * per_channel[layer.name] * b // 8) for b in (2, 3, 4, 8))
        assert layer.bytes == two + three + four + eight + 6 * 4 + 6
    assert "4.5 bits" in str(report)


def test_onnx_files_compute_the_same(tmp_path):
    tokens, x = torch.arange(6).repeat(4), torch.randn(32, 16)
    for activations in (None, 8):
        network = prepare(Picture(), QuantSpec(BITS, activations))
        calibrate(network, [tokens])
        report = export_onnx(network, tokens, tmp_path / f"{activations}.onnx", accuracy_level=0)
        assert report.agreement == 1
        assert report.relative_error < (1e-5 if activations is None else 5e-3)  # an input between two levels
    network = prepare(linear(), QuantSpec(BITS))  # packed by blocks, with levels half a step beside in some rows
    assert export_onnx(network, x, tmp_path / "linear.onnx", accuracy_level=0).relative_error < 1e-5


def test_onnx_keeps_the_channels_of_linear_layers_in_their_widths(tmp_path):
    x = torch.randn(16, 256)
    network = prepare(nn.Sequential(nn.Linear(256, 128)), QuantSpec((2, 8) * 64))
    found = export_onnx(network, x, tmp_path / "network.onnx", accuracy_level=0)
    assert found.relative_error < 1e-5
    widest = prepare(nn.Sequential(nn.Linear(256, 128)), QuantSpec(8))
    saved = export_onnx(widest, x, tmp_path / "widest.onnx", accuracy_level=0).bytes - found.bytes
    assert 0.6 < saved / (64 * 256 * 6 / 8) < 1  # one operator more, and the order of the channels
    graph = (tmp_path / "network.onnx").read_bytes().decode("latin1")
    assert graph.count("MatMulNBits") == 2


def test_whole_numbers_and_torchao_compute_the_same():
    network, x = prepare(linear(), QuantSpec(BITS, 8)), torch.randn(32, 16)
    calibrate(network, [x])
    torch.testing.assert_close(integer_linear(network[0], x), network(x), rtol=1e-4, atol=1e-5)
    pytest.importorskip("torchao")
    weights_alone = prepare(linear(), QuantSpec(BITS))
    torch.testing.assert_close(to_torchao(weights_alone, x)(x), weights_alone(x), rtol=1e-4, atol=1e-5)


def test_a_student_with_bits_of_channels_is_distilled_and_reads_its_checkpoint(make_trainer, tmp_path):
    torch.manual_seed(0)
    plan = {"layers.0": [4, 2] * 8, "layers.2": [8] + [3] * 9}
    network = MLP((64, 16, 10))
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    overrides = dict(zip(names, plan.values(), strict=True))
    module = QADModule(network, overrides=overrides, alpha=0.0)
    trainer = make_trainer(max_steps=20)
    trainer.fit(module, datamodule=DigitsDataModule(seed=0))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    first, last = quantized_layers(module.student).values()
    assert [len(row.unique()) for row in first.quantized_weight()[:2]] == [15, 4]
    assert first.log_weight_scale.grad is None or first.log_weight_scale.grad.isfinite().all()
    other = QADModule(MLP((64, 16, 10)), alpha=0.0)
    other.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], strict=False)
    assert [layer.bits for layer in quantized_layers(other.student).values()] == [(4, 2) * 8, (8, *[3] * 9)]
    x = torch.randn(7, 64)
    assert torch.equal(other.student.eval()(x), module.student.eval()(x))
    assert (last.weight_bits, last.mean_weight_bits) == (8, 3.5)


def test_files_of_settings_give_channels_their_bits():
    parser = ArgumentParser()
    parser.add_class_arguments(QuantSpec, "spec")
    spec = parser.instantiate(parser.parse_object({"spec": {"weights": [8, 4, 2], "activations": 8}})).spec
    assert spec == QuantSpec((8, 4, 2), 8)
    assert QuantSpec([8, 4, 2], 8) == spec


def test_bad_bits_of_channels_are_refused_and_nothing_is_changed():
    for arguments, message in (
        ({"weights": ()}, r"`weights` must give each channel 1 to 8 bits, got \(\)"),
        ({"weights": (4, 16)}, r"`weights` must give each channel 1 to 8 bits, got \(4, 16\)"),
        ({"weights": (4, True)}, "must give each channel 1 to 8 bits"),
        ({"weights": (4, 1), "scheme": "lsq"}, "One bit has no level at 0, which scheme='lsq' needs"),
        ({"weights": (4, 8), "granularity": "tensor"}, "with granularity='tensor' all share one step"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantSpec(**arguments)
    network = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 5))
    with pytest.raises(ValueError, match="'2' has 5 output channels, but there are bits for 6"):
        prepare(network, QuantSpec(BITS))
    assert not quantized_layers(network)
    prepare(network, QuantSpec(4))
    for plan, message in (
        ({"0": 2, "2": BITS}, "'2' has 5 output channels, but there are bits for 6"),
        ({"0": 2, "1": (2, 4, 8, 16, 2, 2)}, "`bits of 1` must give each channel 1 to 8 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            set_bits(network, plan)
    assert [layer.bits for layer in quantized_layers(network).values()] == [4, 4, 4]
