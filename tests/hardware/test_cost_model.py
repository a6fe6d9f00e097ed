import math

import pytest
import torch
from torch import nn

from lightning_distill.hardware import (
    PRESETS,
    CostModel,
    Kernel,
    LayerCost,
    cost_model,
    count_costs,
    plot_costs,
    speedup,
)

LAYER = LayerCost("0", "Linear", calls=3, flops=2000, weight_bytes=100.0, activation_bytes=300.0)
MODEL = CostModel(overhead=1e-3, throughput=1e6, bandwidth=1e5, speedups={8: 4.0})
CALIBRATED = CostModel(
    throughput=1e6,
    kernels={"matrix": Kernel(overhead=1e-5, throughput=2e9), "matrix, int8": Kernel(copy=1.0), "view": Kernel()},
    runtime="onnx",
    start=3e-6,
)


@pytest.mark.chapter("D46", api="lightning_distill.hardware.CostModel")
def test_latency_is_overhead_and_arithmetic_and_memory():
    assert MODEL.latency(LAYER) == pytest.approx(3e-3 + 2e-3 + 4e-3)
    narrow = LayerCost("0", "Linear", calls=3, flops=2000, activation_bytes=400.0, weight_bits=4, compute_bits=8)
    assert MODEL.latency(narrow) == pytest.approx(3e-3 + 0.5e-3 + 4e-3)
    assert CostModel().latency(LAYER) == 0


def test_convolutions_have_a_throughput_of_their_own():
    layer = LayerCost("0", "Conv2d", flops=2000, convolution_flops=1500, padded_flops=3000.0)
    model = CostModel(throughput=1e6, convolution_throughput=1e5)
    assert model.latency(layer) == pytest.approx(0.5e-3 + 30e-3)
    assert CostModel(throughput=1e6).latency(layer) == pytest.approx(2e-3)


@pytest.mark.chapter("D46", api="lightning_distill.hardware.PRESETS")
def test_the_preset_of_arithmetic_alone_is_the_golden_one(golden):
    case = golden("latency_model")
    layers = [
        LayerCost("", "", flops=int(ops), compute_bits=int(bits))
        for ops, bits in zip(case.inputs["ops"], case.inputs["bits"], strict=True)
    ]
    assert case.inputs["peak_ops_per_s"] == PRESETS["compute"].throughput
    total = sum(PRESETS["compute"].latency(layer) for layer in layers)
    assert total == pytest.approx(case.expected["latency_s"], rel=case.rtol)
    for preset in PRESETS.values():
        for bits, factor in preset.speedups.items():
            assert factor == speedup(bits)


@pytest.mark.chapter("D50", api="lightning_distill.hardware.CostModel")
def test_energy_counts_macs_and_accesses(golden):
    case = golden("energy_with_memory")
    model = CostModel(access_nanojoules=case.inputs["nj_mem"])
    layers = [
        LayerCost("", "", flops=2 * int(macs), activation_bytes=8 * float(accesses), compute_bits=bits)
        for macs, accesses, bits in zip(case.inputs["ops"], case.inputs["mem_access"], (32, 8), strict=True)
    ]
    report = model.report(layers, size=0)
    assert report.energy == pytest.approx(case.expected["total_j"], rel=case.rtol)


def test_a_width_without_a_figure_counts_as_the_next_wider_one():
    joules = {bits: CostModel().energy(LayerCost("", "", flops=2000, compute_bits=bits)) for bits in (2, 8, 16, 32, 64)}
    assert joules[2] == joules[8] == pytest.approx(0.3e-9)
    assert joules[16] == joules[32] == joules[64] == pytest.approx(4.6e-9)


def test_a_report_adds_its_layers():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = torch.zeros(5, 8)
    report = MODEL.estimate(model, batch)
    costs = count_costs(model, batch)
    assert tuple(layer.cost for layer in report.layers) == costs
    assert report.latency == pytest.approx(sum(map(MODEL.latency, costs)))
    assert report.energy == pytest.approx(sum(map(MODEL.energy, costs)))
    assert report.flops == 2 * 5 * (8 * 4 + 4 * 2)
    assert report.bytes == sum(cost.bytes for cost in costs)
    assert report.size == 4 * (36 + 10)
    lines = str(report).splitlines()
    assert len(lines) == 1 + 3 + 1 + 1
    assert lines[1].split()[:3] == ["0", "Linear", "32"]
    assert lines[-2].split()[0] == "all"
    assert lines[-1] == "184 bytes stored; cost model: custom"


def test_a_run_takes_its_start_beside_its_layers():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU())
    report = CALIBRATED.estimate(model, torch.zeros(5, 8))
    assert report.start == 3e-6
    assert report.latency == pytest.approx(3e-6 + sum(layer.latency for layer in report.layers))
    lines = str(report).splitlines()
    assert lines[-3].split() == ["start", "0.000", "0.0", "3.0", "0.0"]
    assert float(lines[-2].split()[-2]) == pytest.approx(report.latency * 1e6, abs=0.06)


def test_a_saved_model_is_the_same(tmp_path):
    for model in (CALIBRATED, MODEL, CostModel(convolution_throughput=2.0, name="x"), *PRESETS.values()):
        model.save(tmp_path / "deep" / "model.json")
        assert CostModel.load(tmp_path / "deep" / "model.json") == model
        assert cost_model(tmp_path / "deep" / "model.json") == model
    assert cost_model("ideal") is PRESETS["ideal"]


def test_other_files_and_names_are_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"overhead": 1}')
    with pytest.raises(ValueError, match=r"other.json' is no cost model: expected the keys \['access_nanojoules'"):
        CostModel.load(tmp_path / "other.json")
    CALIBRATED.save(tmp_path / "kernels.json")
    text = (tmp_path / "kernels.json").read_text()
    (tmp_path / "kernels.json").write_text(text.replace('"copy"', '"picture"'))
    with pytest.raises(
        ValueError, match=r"the kernel 'matrix, int8' has \['picture'\], expected some of \['bandwidth'"
    ):
        CostModel.load(tmp_path / "kernels.json")
    (tmp_path / "kernels.json").write_text(text.replace("2000000000.0", "-1"))
    with pytest.raises(ValueError, match="`throughput` must be positive, got -1"):
        CostModel.load(tmp_path / "kernels.json")
    with pytest.raises(ValueError, match=r"must be one of \['compute', 'ideal'\] or a JSON file, got 'idea'"):
        cost_model("idea")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overhead": -1.0}, "`overhead` must be finite and at least 0, got -1.0"),
        ({"overhead": math.nan}, "`overhead` must be finite"),
        ({"throughput": 0.0}, "`throughput` must be positive, got 0.0"),
        ({"convolution_throughput": -1.0}, "`convolution_throughput` must be positive"),
        ({"bandwidth": math.nan}, "`bandwidth` must be positive, got nan"),
        ({"speedups": {8: 0.0}}, r"`speedups\[8\]` must be positive"),
        ({"start": -1.0}, "`start` must be finite and at least 0, got -1.0"),
        ({"runtime": "tflite"}, r"`runtime` must be one of \['torch', 'onnx'\], got 'tflite'"),
        ({"picojoules": {}}, "`picojoules` must have at least one width"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CostModel(**arguments)


def test_the_picture_is_drawn(tmp_path):
    plot_costs(MODEL.report([LAYER] * 45, size=1), tmp_path / "new" / "costs.png")
    assert (tmp_path / "new" / "costs.png").read_bytes().startswith(b"\x89PNG")
