import math

import pytest
import torch
from torch import nn

from lightning_distill.hardware import CostModel, Kernel, LayerCost, Operation, Use, count_costs, kernel_use
from lightning_distill.quantization import QuantSpec, prepare

KERNEL = Kernel(overhead=1.0, copy=0.5, throughput=10.0, bandwidth=4.0, weight_bandwidth=2.0)


def uses(model, batch, runtime, bits=None):
    return [
        kernel_use(operation, cost, runtime)
        for cost in count_costs(model, batch, bits=bits)
        for operation in cost.operations
        if operation.kind != "view"
    ]


@pytest.mark.chapter("D46", api="lightning_distill.hardware.Kernel")
def test_a_kernel_adds_calls_copies_operations_and_bytes():
    assert KERNEL.latency(Use("any")) == 1.0
    assert KERNEL.latency(Use("any", copies=4, flops=30, activation_bytes=8, weight_bytes=6)) == 1 + 2 + 3 + 2 + 3
    assert Kernel().latency(Use("any", 4, 30, 8, 6)) == 0


def test_more_work_never_takes_less_time():
    base = {"copies": 3, "flops": 5.0, "activation_bytes": 7.0, "weight_bytes": 9.0}
    for name in base:
        assert KERNEL.latency(Use("any", **base | {name: base[name] + 1})) > KERNEL.latency(Use("any", **base))


def test_a_kernel_comes_back_from_its_seconds_and_its_dictionary():
    for kernel in (KERNEL, Kernel(), Kernel(throughput=3.0)):
        assert Kernel.of_seconds(kernel.seconds) == kernel
        assert Kernel(**kernel.as_dict()) == kernel
    assert Kernel(throughput=3.0).as_dict() == {"throughput": 3.0}


@pytest.mark.parametrize("name", ["overhead", "copy"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_seconds_must_be_finite_and_not_negative(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be finite and at least 0, got {value}"):
        Kernel(**{name: value})


@pytest.mark.parametrize("name", ["throughput", "bandwidth", "weight_bandwidth"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_rates_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got {value}"):
        Kernel(**{name: value})


def test_eager_mode_has_two_algorithms_for_convolutions():
    layer = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    (one,) = uses(layer, torch.zeros(1, 8, 6, 6), "torch")
    assert (one.kernel, one.flops, one.copies) == ("convolution by columns", 2 * 36 * 8 * 16 * 9, 36 * 8 * 9 / 6)
    assert one.activation_bytes == 2 * 4 * (36 * 8 * 9)  # written and read
    (two,) = uses(layer, torch.zeros(2, 8, 6, 6), "torch")
    assert (two.kernel, two.flops) == ("convolution by blocks", 2 * 72 * 16 * 16 * 9)
    assert two.activation_bytes == 4 * 72 * (8 + 16)
    assert one.weight_bytes == two.weight_bytes == 4 * 8 * 16 * 9


def test_columns_are_copied_row_by_row_and_strided_ones_number_by_number():
    for runtime in ("torch", "onnx"):
        (whole,) = uses(nn.Conv1d(3, 8, 3), torch.zeros(1, 3, 19), runtime)
        (strided,) = uses(nn.Conv1d(3, 8, 3, stride=2), torch.zeros(1, 3, 19), runtime)
        assert (whole.copies, whole.activation_bytes) == (9, 8 * 17 * 9)  # rows of 17 positions
        assert (strided.copies, strided.activation_bytes) == (9 * 9, 8 * 9 * 9)
        (pointwise,) = uses(nn.Conv1d(3, 8, 1), torch.zeros(1, 3, 19), runtime)
        assert (pointwise.copies, pointwise.activation_bytes) == (0, 4 * 19 * (3 + 8))


def test_kernels_of_eager_mode():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.GELU(), nn.Linear(4, 4))
    names = ["matrix", "function", "activation", "function", "matrix"]
    assert [use.kernel for use in uses(model, torch.zeros(2, 4), "torch")] == names
    prepare(model, QuantSpec(4, 8))
    found = uses(model, torch.zeros(2, 4), "torch")
    assert [use.kernel for use in found] == names  # fake quantization computes in floating point
    assert found[0].weight_bytes == (16 + 4) * 4 / 8


@pytest.mark.parametrize(
    ("spec", "suffix", "bits"),
    [
        (QuantSpec(8, 8), ", int8", 8),
        (QuantSpec(4, 8), ", int8", 8),
        (QuantSpec(2, 4), ", int8", 8),
        (QuantSpec(8), ", 8-bit weights", 8),
        (QuantSpec(5), ", 8-bit weights", 8),
        (QuantSpec(4), ", 4-bit weights", 4),
        (QuantSpec(3), ", 4-bit weights", 4),
        (QuantSpec(2), ", 2-bit weights", 2),
        (QuantSpec(1), ", 2-bit weights", 2),
        (QuantSpec(16), "", 32),
    ],
)
@pytest.mark.parametrize(("rows", "kernel"), [(1, "vector"), (3, "matrix")])
def test_linear_layers_of_onnx_runtime(spec, suffix, bits, rows, kernel):
    (use,) = uses(prepare(nn.Sequential(nn.Linear(6, 5, bias=False)), spec), torch.zeros(rows, 6), "onnx")
    assert use == Use(kernel + suffix, 0, 2 * rows * 30, 4 * rows * 11, 30 * bits / 8)


@pytest.mark.parametrize(
    ("spec", "suffixes"),
    [
        (QuantSpec(8, 8), (", int8", ", int8 to float")),
        (QuantSpec(2, 8), (", int8", ", int8 to float")),
        (QuantSpec(8), (", 8-bit weights",) * 2),
        (QuantSpec(2), (", 4-bit weights",) * 2),
    ],
)
def test_convolutions_of_onnx_runtime_need_a_reader_of_integers(spec, suffixes):
    model = nn.Sequential(nn.Conv1d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv1d(4, 5, 3, bias=False))
    first, relu, second = uses(prepare(model, spec), torch.zeros(2, 3, 9), "onnx")
    assert (first.kernel, second.kernel) == tuple(f"convolution{suffix}" for suffix in suffixes)
    assert relu.kernel == "activation"
    integers = suffixes[0] == ", int8"  # channels of a position are copied together, else positions of a channel
    assert first.copies == 2 * 3 * (7 if integers else 3)
    assert first.activation_bytes == 2 * (1 if integers else 4) * (2 * 7 * 9)
    assert first.weight_bytes == 36 * (1 if "4" not in suffixes[0] else 0.5)


def test_convolutions_of_onnx_runtime_in_floating_point():
    (flat,) = uses(nn.Conv1d(8, 8, 3), torch.zeros(2, 8, 9), "onnx")
    (image,) = uses(nn.Conv2d(8, 8, 3), torch.zeros(2, 8, 9, 9), "onnx")
    (each,) = uses(nn.Conv2d(8, 8, 3, groups=8), torch.zeros(2, 8, 9, 9), "onnx")
    assert flat.kernel == "convolution"
    assert flat.flops == 2 * 2 * 7 * 64 * 3
    assert image == Use("convolution by blocks", 0, 2 * 2 * 49 * 256 * 9, 4 * 2 * 8 * (81 + 49), 4 * (8 * 8 * 9 + 8))
    assert each.kernel == "depthwise convolution by blocks"


def test_images_with_few_bits_are_not_computed_in_blocks():
    model = prepare(nn.Sequential(nn.Conv2d(8, 8, 3)), QuantSpec(8))
    (use,) = uses(model, torch.zeros(2, 8, 9, 9), "onnx")
    assert (use.kernel, use.flops) == ("convolution, 8-bit weights", 2 * 2 * 49 * 64 * 9)


def test_a_plan_of_bits_chooses_the_kernels():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    found = uses(model, torch.zeros(2, 4), "onnx", bits={"0": 4, "2": 32})
    assert [use.kernel for use in found] == ["matrix, 4-bit weights", "activation", "matrix"]


def test_a_model_takes_its_kernel_or_that_of_floating_point_or_its_constants():
    work = Operation("matrix", flops=40, parameters=8, activation_bytes=4.0)
    layer = LayerCost("0", "Linear", weight_bits=4, compute_bits=8, activation_bits=8, operations=(work,))
    known = {"matrix": KERNEL, "matrix, int8": Kernel(overhead=0.25), "vector": Kernel(overhead=100.0)}
    assert CostModel(kernels=known, runtime="onnx").latency(layer) == 0.25
    del known["matrix, int8"]
    assert (
        CostModel(kernels=known, runtime="onnx").latency(layer) == 1 + 4 + 1 + 4
    )  # its weights are stored with 8 bits
    assert CostModel(kernels=known, runtime="torch").latency(layer) == 1 + 4 + 1 + 2
    del known["matrix"]
    model = CostModel(overhead=1.0, throughput=10.0, bandwidth=4.0, speedups={8: 4.0}, kernels=known, runtime="onnx")
    assert model.latency(layer) == 1 + 40 / 10 / 4 + (4 + 4) / 4
    assert CostModel(overhead=1.0, kernels=known).latency(LayerCost("0", "Linear", calls=3)) == 3.0  # as does a count
    assert CostModel(overhead=1.0).latency(layer) == 0  # without kernels, what the layer counts
    assert CostModel(overhead=1.0).latency(LayerCost("0", "Linear", calls=3, operations=(work,))) == 3.0


def test_a_convolution_without_a_kernel_has_its_throughput():
    model = CostModel(throughput=1e6, convolution_throughput=1e5, kernels={"matrix": KERNEL})
    (cost,) = count_costs(nn.Conv3d(16, 16, 1, bias=False), torch.zeros(2, 16, 2, 2, 2))
    assert model.latency(cost) == pytest.approx(cost.flops / 1e5)
