"""``lightning-distill cost``."""

from pathlib import Path

import pytest

from lightning_distill.cli import main
from lightning_distill.hardware import CostModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI with jsonargparse 4.53

EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist1d_teacher.yaml"


def test_it_prints_a_table_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    CostModel(overhead=1.0, name="one second per call").save(tmp_path / "model.json")
    main(["cost", "-c", str(EXAMPLE), "--cost.model", "model.json", "--cost.folder", "out"])
    said = capsys.readouterr().out
    assert "blocks.0.residual.0.0" in said
    assert "cost model: one second per call" in said
    assert (tmp_path / "out" / "cost.txt").read_text() in said
    assert (tmp_path / "out" / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_it_calibrates_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_distill.cli.cost.calibrate_cost_model", lambda: CostModel(throughput=3.0, name="me"))
    main(["cost", "-c", str(EXAMPLE), "--cost.folder", str(tmp_path)])
    assert CostModel.load(tmp_path / "cost_model.json").throughput == 3.0
    assert "cost model: me" in capsys.readouterr().out


def test_it_calibrates_onnx_runtime_if_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lightning_distill.cli.cost.calibrate_onnx", lambda: CostModel(runtime="onnx", start=2e-6))
    main(["cost", "-c", str(EXAMPLE), "--cost.runtime", "onnx", "--cost.folder", str(tmp_path)])
    assert CostModel.load(tmp_path / "cost_model.json").runtime == "onnx"
    assert "start" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["cost", "-c", str(EXAMPLE), "--cost.runtime", "tflite", "--cost.folder", str(tmp_path)])
    assert "tflite" in capsys.readouterr().err


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(
        SystemExit, match=r"lightning-distill cost: error: The cost model must be one of .*, got 'fast'"
    ):
        main(["cost", "-c", str(EXAMPLE), "--cost.model", "fast", "--cost.folder", str(tmp_path)])
