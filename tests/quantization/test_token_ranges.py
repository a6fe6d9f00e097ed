"""Inputs of which each vector has a range of its own."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import QADModule
from lightning_distill.networks import MLP
from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    export_onnx,
    integer_linear,
    prepare,
    quantized_layers,
    read_packed,
    set_alpha,
    size_report,
    to_torchao,
    write_packed,
)

SPEC = QuantSpec(8, 8, activation_range="token")


def network():
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 6))


def tokens(rows=20):
    """Vectors of very different sizes, three dimensions."""
    return torch.randn(2, rows, 16) * torch.logspace(-2, 2, rows)[:, None]


@pytest.mark.chapter("D11", api="lightning_distill.quantization.QuantSpec")
def test_each_vector_is_quantized_with_the_chapters_numbers():
    values = torch.tensor([-1.3, -0.61, -0.2, 0.04, 0.25, 0.5, 0.77, 1.9])
    expected = torch.tensor([-1.28, -0.64, -0.213333, 0, 0.213333, 0.426667, 0.853333, 1.92])
    layer = prepare(nn.Sequential(nn.Linear(8, 3)), QuantSpec(8, 4, activation_range="token"))[0]
    batch = torch.stack([values, 100 * values, -values.flip(0)])[None]
    found = layer.quantized_input(batch)[0]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], 100 * expected, rtol=0, atol=1e-4)
    scale, zero = layer.input_levels(batch)
    assert scale.shape == zero.shape == (1, 3, 1)
    torch.testing.assert_close(scale[0, :2, 0], torch.tensor([0.213333, 21.3333]), rtol=1e-5, atol=0)
    assert zero[0, :2, 0].tolist() == [6, 6]
    assert (found[2] - batch[0, 2]).abs().max() <= 0.5 * float(scale[0, 2]) + 1e-6


def test_no_calibration_and_no_parameter_is_needed_and_gradients_pass():
    plain, x = network(), tokens().requires_grad_()
    names = {name for name, _ in plain.named_parameters()}
    prepare(plain, SPEC)
    calibrate(plain)
    assert {name for name, _ in plain.named_parameters()} - names == {"0.log_weight_scale", "2.log_weight_scale"}
    assert all(layer.is_calibrated for layer in quantized_layers(plain).values())
    layer = plain[0]
    layer.quantized_input(x).sum().backward()
    assert x.grad.eq(1).float().mean() > 0.9  # all but ends that zero's whole code pushes out of the range
    set_alpha(plain, 0.0)
    plain(x).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_vectors_do_not_look_at_each_other_and_small_ones_keep_their_numbers():
    x = tokens()
    own, shared = prepare(network(), SPEC), prepare(network(), QuantSpec(8, 8))
    calibrate(shared, [x])
    for row in (0, 7, 19):
        assert torch.equal(own[0].quantized_input(x)[:, row], own[0].quantized_input(x[:, row]))

    def error(layer):
        return ((layer.quantized_input(x) - x).norm(dim=-1) / x.norm(dim=-1)).max()

    assert error(own[0]) < 0.01
    assert error(shared[0]) > 0.5


def test_whole_numbers_torchao_and_files_compute_the_same(tmp_path):
    quantized, x = prepare(network(), SPEC).eval(), tokens()
    torch.testing.assert_close(integer_linear(quantized[0], x), quantized[0](x), rtol=1e-3, atol=1e-3)
    write_packed(quantized, tmp_path / "packed.safetensors")
    again = read_packed(network(), tmp_path / "packed.safetensors")
    assert torch.equal(again(x), quantized(x))
    assert again[0].spec.activation_range == "token"
    assert size_report(quantized).bytes == 16 * 12 + 12 * 6 + 4 * (12 + 6) + 4 * (12 + 6)
    pytest.importorskip("torchao")
    theirs = to_torchao(quantized, x)
    torch.testing.assert_close(theirs(x), quantized(x), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(theirs(x[0]), quantized(x[0]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bits", [8, 4])
def test_onnx_runtime_finds_ranges_as_it_goes(bits, tmp_path):
    quantized, x = prepare(network(), QuantSpec(bits, 8, activation_range="token")).eval(), tokens()
    report = export_onnx(quantized, x, tmp_path / "network.onnx")
    assert report.relative_error < 0.02
    assert "MatMulNBits" in (tmp_path / "network.onnx").read_bytes().decode("latin1")


def test_a_student_is_trained_from_loaders_without_ranges(make_trainer):
    torch.manual_seed(0)
    module = QADModule(MLP((16, 12, 4)), spec=QuantSpec(4, 8, activation_range="token"), alpha=0.3)
    loader = DataLoader(TensorDataset(torch.randn(64, 16), torch.randint(0, 4, (64,))), batch_size=16)
    before = {name: p.detach().clone() for name, p in module.student.named_parameters()}
    make_trainer(max_epochs=2).fit(module, loader)
    assert all(not torch.equal(p, before[name]) for name, p in module.student.named_parameters())


def test_what_reads_no_vectors_is_refused():
    with pytest.raises(ValueError, match="`activation_range` must be 'layer' or 'token', got 'row'"):
        QuantSpec(8, 8, activation_range="row")
    with pytest.raises(ValueError, match="but inputs are not quantized: set `activations=8`"):
        QuantSpec(8, activation_range="token")
    model = nn.Sequential(nn.Embedding(5, 4), nn.Conv1d(3, 2, 1), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"but '1' is a Conv1d, which reads no vectors.*`skip=\['1'\]`"):
        prepare(model, SPEC)
    assert not quantized_layers(model)
    prepare(model, SPEC, skip=["1"])
    assert [layer.activation_bits for layer in quantized_layers(model).values()] == [None, 8]
