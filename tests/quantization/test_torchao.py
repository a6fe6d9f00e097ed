"""Quantized linear layers as tensors of torchao."""

import pytest
import torch
from torch import nn

from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    integer_weight,
    prepare,
    quantized_layers,
    set_alpha,
    to_torchao,
)

pytest.importorskip("torchao")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def student(spec, **kwargs):
    network, values = prepare(perceptron(), spec, **kwargs), torch.randn(32, 64)
    calibrate(network, [values])
    with torch.no_grad():  # steps that no search would choose: training has moved them
        for layer in quantized_layers(network).values():
            layer.log_weight_scale.add_(0.1 * torch.randn_like(layer.log_weight_scale))
            if layer.activation_bits is not None:
                layer.log_activation_scale.add_(0.05)
    return network, values


SPECS = [
    QuantSpec(8),
    QuantSpec(4),
    QuantSpec(2),
    QuantSpec(1),
    QuantSpec(3, granularity="tensor"),
    QuantSpec(4, granularity="group:16"),
    QuantSpec(2, granularity="group:16"),
    QuantSpec("ternary"),
    QuantSpec("binary"),
    QuantSpec(16),
    QuantSpec(8, 8),
    QuantSpec(2, 8),
    QuantSpec(4, 8, granularity="tensor"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_torchao_computes_what_was_trained(spec):
    network, values = student(spec)
    with torch.no_grad():
        expected, found = network(values), to_torchao(network, values)(values)
    # inputs on the edge of two codes may be rounded to the other one
    tolerance = 5e-3 if spec.activations else 1e-5
    assert float((found - expected).norm() / expected.norm()) < tolerance
    for layer in quantized_layers(network).values():  # nothing is left on the network
        assert layer.spec is spec
        assert not layer._forward_pre_hooks


def test_steps_and_codes_are_those_of_training():
    from torchao.quantization import Int8Tensor

    network, values = student(QuantSpec(2, 8))
    exported = to_torchao(network, values)
    for ours, theirs in zip(quantized_layers(network).values(), (exported[0], exported[2]), strict=True):
        assert type(theirs) is nn.Linear
        assert isinstance(theirs.weight, Int8Tensor)
        expected = integer_weight(ours).symmetric()
        torch.testing.assert_close(theirs.weight.scale, expected.scale[..., 0])
        assert torch.equal(theirs.weight.qdata, expected.codes.squeeze(1).to(torch.int8))
        assert float(theirs.weight.act_quant_scale) == pytest.approx(ours.activation_scale.item())
        assert int(theirs.weight.act_quant_zero_point) + 128 == int(ours.activation_zero_point)


@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(4, 8)], ids=str)
def test_a_file_is_a_quarter_and_reads_into_the_network_before(spec, tmp_path):
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))  # noqa: E731
    network, values = prepare(build(), spec), torch.randn(8, 256)
    calibrate(network, [values])
    exported = to_torchao(network, values)
    torch.save(exported.state_dict(), tmp_path / "torchao.pt")
    torch.save(build().state_dict(), tmp_path / "float.pt")
    assert (tmp_path / "torchao.pt").stat().st_size < 0.28 * (tmp_path / "float.pt").stat().st_size
    again = build()
    again.load_state_dict(torch.load(tmp_path / "torchao.pt", weights_only=True), assign=True)
    with torch.no_grad():
        assert torch.equal(again(values), exported(values))


def test_tokens_and_images_may_have_dimensions_of_their_own():
    network = prepare(perceptron(), QuantSpec(8, 8))
    values = torch.randn(4, 7, 64)
    calibrate(network, [values])
    with torch.no_grad():
        expected, found = network(values), to_torchao(network, values)(values)
    assert found.shape == (4, 7, 10)
    assert float((found - expected).norm() / expected.norm()) < 5e-3


def test_a_layer_that_reads_several_numbers_of_dimensions_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, values):
            return self.layer(self.layer(values).mean(dim=1))

    network, values = prepare(Twice(), QuantSpec(8, 8)), torch.randn(4, 3, 8)
    calibrate(network, [values])
    with pytest.raises(ValueError, match=r"'layer' rounds inputs of \[2, 3\] dimensions"):
        to_torchao(network, values)


def test_what_torchao_lacks_is_refused_by_name():
    values = torch.randn(2, 1, 8, 8)
    images = prepare(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2)), QuantSpec(4))
    with pytest.raises(ValueError, match=r"no kernel for '0', a QuantizedConv2d: leave it out, `skip=\['0'\]`"):
        to_torchao(images, values)
    with pytest.raises(ValueError, match="no quantized layer"):
        to_torchao(perceptron(), torch.randn(2, 64))
    for spec, message in (
        (QuantSpec(8, scheme="seq"), "8 bits with levels half a step beside 0"),
        (QuantSpec(8, 4), "inputs of 4 bits"),
        (QuantSpec(16, 8), "rounds its inputs but not its weights"),
        (QuantSpec(4, 8, granularity="group:16"), "a step per group"),
    ):
        network, rows = student(spec)
        with pytest.raises(ValueError, match=message):
            to_torchao(network, rows)
    network, rows = student(QuantSpec(4))
    set_alpha(network, 0.5)
    with pytest.raises(ValueError, match="alpha"):
        to_torchao(network, rows)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-distill\[torchao\]"):
        to_torchao(prepare(perceptron(), QuantSpec(4)), torch.randn(2, 64))


def test_an_adapter_stays_on_a_base_of_torchao():
    peft = pytest.importorskip("peft")
    network = peft.get_peft_model(
        perceptron(), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    ).eval()
    prepare(network, QuantSpec(4))
    values = torch.randn(8, 64)
    exported = to_torchao(network, values)
    assert not quantized_layers(exported)
    with torch.no_grad():
        torch.testing.assert_close(exported(values), network(values), rtol=1e-4, atol=1e-4)
