"""Quantized networks in ONNX Runtime."""

import logging
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_distill.quantization import (
    QuantSpec,
    calibrate,
    export_onnx,
    integer_weight,
    onnx_latency,
    prepare,
    quantized_layers,
    run_onnx,
    set_alpha,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.WARNING)  # the exporter speaks of torchvision
    yield
    logging.disable(logging.NOTSET)


class Residual(nn.Module):
    """Batch normalization that is no neighbour in a Sequential, of negative and of no gain."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, images):
        hidden = self.norm(self.first(images)).relu()
        hidden = self.norm2(self.second(hidden)).relu()
        return self.head(self.third(hidden).relu().mean(dim=(2, 3)))


def residual():
    network = Residual()
    for norm in (network.norm, network.norm2):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias, std=0.1)
        norm.weight.data[3] = 0.0
    return network.eval()


def mlp():
    return nn.Sequential(nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 10)).eval()


def quantized(network, inputs, spec, **arguments):
    calibrate(prepare(network, spec, **arguments), [inputs])
    return network


def operators(path, tmp_path):
    """What ONNX Runtime makes of the file."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 3
    onnxruntime.InferenceSession(str(path), options)
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.chapter("D19", api="lightning_distill.quantization.export_onnx")
@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (2, 8), ("ternary", 4)])
def test_a_convolutional_network_is_computed_with_integers(weights, activations, tmp_path):
    images = torch.randn(16, 3, 8, 8)
    network = quantized(residual(), images, QuantSpec(weights, activations))
    report = export_onnx(network, images, tmp_path / "a.onnx")
    assert report.relative_error < 0.02
    found = operators(report.path, tmp_path)
    assert found["QLinearConv"] == 2  # the third one's output is averaged, and so wanted in floating point
    assert found["QGemm"] == 1
    assert found["BatchNormalization"] == 0
    torch.testing.assert_close(run_onnx(report.path, images[:3]), run_onnx(report.path, images)[:3])
    with torch.no_grad():
        clipped = network(4 * images)
    assert (run_onnx(report.path, 4 * images) - clipped).norm() < 0.02 * clipped.norm()


@pytest.mark.parametrize(
    ("spec", "bits"),
    [
        (QuantSpec(8), 8),
        (QuantSpec(2), 2),
        (QuantSpec(1), 2),
        (QuantSpec("ternary"), 2),
        (QuantSpec(4, granularity="group:32"), 4),
        (QuantSpec(4, granularity="tensor"), 4),
    ],
    ids=str,
)
def test_weights_alone_are_packed_in_as_many_bits(spec, bits, tmp_path):
    import onnx

    inputs = torch.randn(8, 96)
    network = prepare(mlp(), spec)
    with torch.no_grad():  # steps as training leaves them, not those that calibration would find again
        for layer in quantized_layers(network).values():
            layer.log_weight_scale.add_(0.1 * torch.randn_like(layer.log_weight_scale))
    report = export_onnx(network, inputs, tmp_path / "a.onnx", accuracy_level=0)
    assert report.relative_error < 1e-5
    assert report.agreement == 1
    graph = onnx.load(report.path).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert [a.i for node in nodes for a in node.attribute if a.name == "bits"] == [bits, bits]
    sizes = {tensor.name: len(tensor.raw_data) for tensor in graph.initializer}
    assert sizes[nodes[1].input[1]] == 10 * 128 * bits // 8
    fast = export_onnx(network, inputs, tmp_path / "fast.onnx")
    assert 0 < fast.relative_error < 0.03


def test_groups_that_the_packed_operator_does_not_have_are_stored_with_four_bits(tmp_path):
    inputs = torch.randn(8, 96)
    for number, network in enumerate(
        [
            prepare(mlp(), QuantSpec(4, granularity="group:8")),
            quantized(mlp(), inputs, QuantSpec(4, 8, granularity="group:32")),
        ]
    ):
        report = export_onnx(network, inputs, tmp_path / f"{number}.onnx")
        assert report.relative_error < 1e-3


def test_tokens_and_keyword_arguments(tmp_path):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(50, 32), nn.Linear(32, 32), nn.Linear(32, 3)

        def forward(self, input_ids, attention_mask):
            hidden = self.mix(self.table(input_ids)).relu() * attention_mask[..., None]
            return self.head(hidden.sum(dim=1))

    batch = {"input_ids": torch.randint(50, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.int64)}
    network = prepare(Words().eval(), QuantSpec(8, 8))
    calibrate(network, [batch])
    report = export_onnx(network, batch, tmp_path / "a.onnx", dynamic={0: "batch", 1: "length"})
    assert report.relative_error < 0.01
    longer = {"input_ids": torch.randint(50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    with torch.no_grad():
        expected = network(**longer)
    assert (run_onnx(report.path, longer) - expected).norm() < 0.02 * expected.norm()
    assert operators(report.path, tmp_path)["MatMulIntegerToFloat"] == 1


def test_the_first_token_speaks_for_all(tmp_path):
    """A pooler, as BERT's: a scalar index must stay a scalar in the file, or later shapes are wrong."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.pool, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.head(self.pool(self.mix(x)[:, 0]).tanh())

    inputs = torch.randn(4, 5, 8)
    network = prepare(First().eval(), QuantSpec(8, 8))
    calibrate(network, [inputs])
    report = export_onnx(network, inputs, tmp_path / "a.onnx")
    assert report.relative_error < 0.01
    assert run_onnx(report.path, inputs).shape == (4, 3)


def test_layers_in_floating_point_and_networks_without_quantization(tmp_path):
    inputs = torch.randn(8, 96)
    mixed = prepare(mlp(), QuantSpec(8), overrides={"2": 16})
    before = {name: value.clone() for name, value in mixed.state_dict().items()}
    assert export_onnx(mixed, inputs, tmp_path / "a.onnx", accuracy_level=0).relative_error < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in mixed.state_dict().items())
    report = export_onnx(mlp(), inputs, tmp_path / "b.onnx")
    assert report.relative_error < 1e-5
    assert 1 < report.bytes / report.float32_bytes < 1.1
    assert onnx_latency(report.path, inputs, repeats=2) > 0
    assert "of float32" in str(report)


@pytest.mark.chapter("D19", api="lightning_distill.quantization.integer_weight")
@pytest.mark.parametrize("weights", [8, 4, 2, 1, "binary", "ternary"])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group:8"])
def test_codes_times_steps_are_the_quantized_weights(weights, granularity):
    layer = prepare(nn.Sequential(nn.Linear(16, 4)), QuantSpec(weights, granularity=granularity))[0]
    found = integer_weight(layer)
    for whole in (found, found.symmetric()):
        levels = (whole.codes.float() - whole.zero_point) * whole.scale
        torch.testing.assert_close(levels.reshape(4, 16), layer.quantized_weight().detach())
    assert found.codes.unique().numel() <= 2**layer.weight_bits
    assert found.symmetric().zero_point == 0


def test_bad_input(tmp_path, monkeypatch):
    inputs, path = torch.randn(8, 96), tmp_path / "a.onnx"
    network = prepare(mlp(), QuantSpec(4))
    with pytest.raises(ValueError, match=r"`path` must end in '\.onnx'"):
        export_onnx(network, inputs, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="`tolerance` must be positive"):
        export_onnx(network, inputs, path, tolerance=0)
    with pytest.raises(ValueError, match="`accuracy_level` must be 0 to 4"):
        export_onnx(network, inputs, path, accuracy_level=7)
    with pytest.raises(ValueError, match=r"numbers of \['torch.float64'\]"):
        export_onnx(mlp().double(), inputs.double(), path)
    with pytest.raises(ValueError, match="ranges of what the layers"):
        export_onnx(prepare(mlp(), QuantSpec(4, 8)), inputs, path)
    with pytest.raises(ValueError, match="floating point quantizes its input"):
        export_onnx(quantized(mlp(), inputs, QuantSpec(16, 8)), inputs, path)
    with pytest.raises(ValueError, match="'0' has 8 bits with levels half a step beside 0"):
        export_onnx(quantized(mlp(), inputs, QuantSpec(8, 8, scheme="seq")), inputs, path)
    with pytest.raises(ValueError, match="has no codes"):
        integer_weight(prepare(mlp(), QuantSpec(16))[0])
    with pytest.raises(RuntimeError, match=r"differ by .* more than `tolerance`"):
        export_onnx(network, inputs, path, tolerance=1e-9)
    set_alpha(network, 0.5)
    with pytest.raises(ValueError, match="not wholly quantized"):
        export_onnx(network, inputs, path)
    set_alpha(network, 1.0)
    assert list(tmp_path.iterdir()) == []
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="exists"):
        export_onnx(network, inputs, path)
    assert path.read_text() == "mine"
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        onnx_latency(path, inputs, repeats=0)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-distill\[onnx\]"):
        export_onnx(network, inputs, path, overwrite=True)
