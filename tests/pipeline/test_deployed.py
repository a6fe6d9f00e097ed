"""Networks measured as ONNX Runtime runs them."""

import io
import json
from dataclasses import replace

import lightning as L
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill.datamodules import TensorDataModule
from lightning_distill.hardware import CostModel
from lightning_distill.networks import MLP
from lightning_distill.pipeline import deployed, measure_deployed
from lightning_distill.quantization import QuantSpec, calibrate, export_onnx, prepare, run_onnx

pytest.importorskip("onnxruntime")
MACHINE = CostModel(throughput=1e9, bandwidth=1e9, name="a machine")


@pytest.fixture
def data():
    x = torch.randn(90, 6)
    y = x[:, :3].argmax(dim=1)
    return TensorDataModule(train=(x[:30], y[:30]), validation=(x[30:60], y[30:60]), test=(x[60:], y[60:]))


@pytest.fixture
def networks(data):
    network = MLP((6, 32, 3))
    quantized = prepare(MLP((6, 32, 3)), QuantSpec(weights=8, activations=8))
    calibrate(quantized, [torch.randn(50, 6)])
    return {"as it was": network.train(), "few bits": quantized.train()}


def test_files_are_measured_on_the_test_data_and_kept(networks, data, tmp_path):
    report = measure_deployed(networks, data, tmp_path / "onnx", samples=4, repeats=3, cost_model=MACHINE)
    data.setup("test")
    x, y = next(iter(data.test_dataloader()))[:2]
    for row, (name, network) in zip(report.networks, networks.items(), strict=True):
        path = tmp_path / "onnx" / f"{name.replace(' ', '-')}.onnx"
        found = run_onnx(path, x).argmax(dim=1)
        assert row.name == name
        assert row.bytes == path.stat().st_size
        assert row.metrics["accuracy"] == pytest.approx((found == y).float().mean().item())
        own = network.eval()(x).argmax(dim=1)
        assert row.metrics["agreement"] == pytest.approx((found == own).float().mean().item())
        expected = MACHINE.estimate(network, x[:4])
        assert (row.predicted_seconds, row.energy) == (expected.latency, expected.energy)
        assert row.seconds > 0
        assert row.relative_error < 0.02
    assert report.networks[0].relative_time == 1
    assert report.samples == 4
    written = json.loads((tmp_path / "onnx" / "deployed.json").read_text())
    assert written["cost_model"] == "a machine"
    assert [row["bytes"] for row in written["networks"]] == [row.bytes for row in report.networks]
    assert (tmp_path / "onnx" / "deployed.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    assert f"{report.networks[1].bytes / report.networks[0].bytes:.3f}" in console.export_text()


def test_without_test_data_it_is_the_validation_data(networks, tmp_path):
    class Data(L.LightningDataModule):
        def val_dataloader(self):
            return DataLoader(list(zip(torch.randn(8, 6), torch.arange(8) % 3, strict=True)), batch_size=5)

    report = measure_deployed({"one": networks["as it was"]}, Data(), tmp_path, samples=100, repeats=1)
    assert report.samples == 8
    assert report.cost_model == "ideal"


def test_a_new_measurement_takes_the_place_of_the_old_one(data, tmp_path):
    small, large = MLP((6, 8, 3)), MLP((6, 64, 3))
    first = measure_deployed({"net": large}, data, tmp_path, repeats=1)
    second = measure_deployed({"net": small}, data, tmp_path, repeats=1)
    assert second.networks[0].bytes < first.networks[0].bytes
    assert (tmp_path / "net.onnx").stat().st_size == second.networks[0].bytes


def test_a_file_that_says_something_else_is_reported(networks, data, tmp_path, monkeypatch):
    monkeypatch.setattr(
        deployed, "export_onnx", lambda *args, **named: replace(export_onnx(*args, **named), relative_error=0.3)
    )
    with pytest.warns(UserWarning, match=r"outputs of 'few bits' differ by 0\.3 of their size"):
        report = measure_deployed({"few bits": networks["few bits"]}, data, tmp_path, repeats=1)
    assert report.networks[0].relative_error == 0.3


def test_bad_arguments_are_refused(networks, data, tmp_path):
    cases = {
        "`samples` must be at least 1, got 0": {"samples": 0},
        "`repeats` must be at least 1, got 0": {"repeats": 0},
        r"`metric` must be one of \['accuracy', .*\], got 'auc'": {"metric": "auc"},
        "The cost model must be one of": {"cost_model": "mine"},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            measure_deployed(networks, data, tmp_path, **settings)
    with pytest.raises(ValueError, match="one or more with different file names, got none"):
        measure_deployed({}, data, tmp_path)
    with pytest.raises(ValueError, match=r"different file names, got \['a b', 'a-b'\]"):
        measure_deployed({"a b": nn.Linear(6, 3), "a-b": nn.Linear(6, 3)}, data, tmp_path)
