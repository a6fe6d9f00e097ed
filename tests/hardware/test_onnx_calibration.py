"""Kernels of ONNX Runtime, measured."""

import copy

import pytest
import torch
from torch import nn

from lightning_distill.hardware import CostModel, Kernel, calibrate_onnx, calibration_networks, count_costs
from lightning_distill.networks import MLP, ConvNet1d
from lightning_distill.quantization import QuantSpec, calibrate, export_onnx, prepare

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TRUTH = CostModel(
    kernels={
        "matrix": Kernel(2e-6, throughput=1e11, weight_bandwidth=1e10),
        "matrix, int8": Kernel(1e-6, throughput=4e11, weight_bandwidth=4e10),
        "matrix, 4-bit weights": Kernel(3e-6, throughput=2e11, weight_bandwidth=2e10),
        "activation": Kernel(),
    },
    runtime="onnx",
    start=5e-6,
)


@pytest.mark.chapter("D46", api="lightning_distill.hardware.calibrate_onnx")
def test_each_network_is_timed_in_floating_point_and_quantized():
    networks = [(MLP((16, 32, 10)), (16,), (2, 8)), (ConvNet1d((4, 4)), (1, 40), (2,)), (nn.ReLU(), (3,), (1,))]
    asked = []

    def measure(paths, batch):
        asked.append((len(paths), batch.shape))
        assert all(path.suffix == ".onnx" and path.stat().st_size for path in paths)
        return [1e-3 * (number + 1) for number in range(len(paths))]

    found = calibrate_onnx(networks, weights=(2, 4), measure=measure)
    # without linear layers but the last there is no 2-bit kernel, and without layers nothing to quantize
    assert asked == [(4, (2, 16)), (4, (8, 16)), (3, (2, 1, 40)), (1, (1, 3))]
    assert found.runtime == "onnx"
    assert {name for name in found.kernels if name.startswith("matrix")} == {
        "matrix", "matrix, int8", "matrix, 2-bit weights", "matrix, 4-bit weights"
    }  # fmt: skip
    assert {name for name in found.kernels if name.startswith("convolution")} == {
        "convolution", "convolution, int8", "convolution, 4-bit weights"
    }  # fmt: skip
    assert all(parameter.requires_grad for parameter in networks[0][0].parameters())


def test_times_of_the_machine_give_its_predictions():
    # the files' times come from a known machine instead of a clock: what is counted must be what was exported
    networks = [(MLP(sizes), (sizes[0],), (2, 16, 64)) for sizes in ((8, 64, 64), (64, 256, 10), (300, 30, 30, 30))]
    variants = iter(
        [count_costs(variant, torch.zeros(size, *shape))]
        for network, shape, batches in networks
        for size in batches
        for variant in (network, *(prepared(network, spec) for spec in (QuantSpec(8, 8), QuantSpec(4))))
    )

    def measure(paths, batch):
        return [TRUTH.start + sum(map(TRUTH.latency, next(variants)[0])) for _ in paths]

    found = calibrate_onnx(networks, weights=(4,), measure=measure)
    new = MLP((100, 50, 20))
    for model in (new, *(prepared(new, spec) for spec in (QuantSpec(8, 8), QuantSpec(4)))):
        expected = TRUTH.estimate(model, torch.zeros(7, 100)).latency
        assert found.estimate(model, torch.zeros(7, 100)).latency == pytest.approx(expected, rel=0.02)


def prepared(network, spec):
    return prepare(copy.deepcopy(network), spec)


def test_a_real_calibration_gives_times_that_grow():
    found = calibrate_onnx([(MLP((64, 128, 10)), (64,), (1, 8, 64))], weights=(4,), repeats=3)
    for model in (MLP((64, 256, 10)), prepared(MLP((64, 256, 10)), QuantSpec(8, 8))):
        times = [found.estimate(model, torch.zeros(size, 64)).latency for size in (2, 16, 128)]
        assert times == sorted(times)
        assert 0 < times[0] < 1
    with pytest.raises(ValueError, match="one time for each of at least 3 networks, got 1, 1"):
        calibrate_onnx([(nn.ReLU(), (4,), (1,))], repeats=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(calibration_networks())))
def test_every_network_of_the_calibration_can_be_written(number, tmp_path):
    network, shape, _ = calibration_networks()[number]
    samples = torch.randn(4, *shape)
    if any(True for _ in network.parameters()):
        prepare(network, QuantSpec(8, 8, scheme="minmax"))
        calibrate(network, [samples])
    assert export_onnx(network.eval(), samples, tmp_path / "network.onnx", tolerance=1.0).bytes > 0


def test_the_operators_are_those_that_the_names_of_kernels_say(tmp_path):
    import onnx
    import onnxruntime

    model = nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.Linear(8, 8), nn.Linear(8, 4),
    )  # fmt: skip
    samples = torch.randn(4, 4, 20)
    prepare(model, QuantSpec(8, 8), overrides={"7": QuantSpec(4)})
    calibrate(model, [samples])
    export_onnx(model.eval(), samples, tmp_path / "network.onnx", tolerance=1.0)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "network.onnx"), options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    costs = {cost.name: cost for cost in count_costs(model, samples)}
    assert (costs["0"].feeds_integers, operators.count("QLinearConv")) == (True, 1)
    assert (costs["3"].feeds_integers, operators.count("Conv")) == (False, 1)  # a mean reads it
    assert (costs["6"].activation_bits, operators.count("QGemm")) == (8, 1)
    assert (costs["7"].activation_bits, operators.count("MatMulNBits")) == (None, 1)
    assert "BatchNormalization" not in operators
