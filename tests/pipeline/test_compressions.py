"""A pipeline of several compressions, run as users run it: by one process and by two, killed again and again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

for package in ("onnxruntime", "torch_pruning"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "pipeline_compress_mnist1d.yaml"
KILLS = ["fewer-channels:5", "low-rank:test", "eight-bits:3", "recovered:test"]


def configuration(devices):
    """The example with a small teacher and six steps for each stage."""
    described = yaml.safe_load(EXAMPLE.read_text())
    described["save_every_n_steps"] = 2
    described["common"]["data"]["init_args"]["batch_size"] = 100 // devices
    described["common"]["trainer"] |= {
        "devices": devices,
        "strategy": "ddp" if devices > 1 else "auto",
        "max_epochs": 2,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "callbacks": [{"class_path": "tests.pipeline.killing.Kill"}],
    }
    for stage in described["stages"].values():
        if stage.get("trainer") != {"max_epochs": 0}:
            stage.pop("trainer", None)
    described["stages"]["teacher"]["model"]["init_args"]["student"]["init_args"]["widths"] = [32, 32]
    return described


def run(folder, devices, kill=""):
    folder.mkdir(exist_ok=True)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(configuration(devices), sort_keys=False))
    program = shutil.which("lightning-distill", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert program is not None
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        [sys.executable, program, "pipeline", "-c", "pipeline.yaml", "--folder", "run"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "KILL": kill, "STEPS": "steps.txt"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def stages(folder):
    found = {path.parent.name: json.loads(path.read_text()) for path in (folder / "run").glob("*/manifest.json")}
    return {name: stage for name, stage in found.items() if stage["finished"]}


def deployed(folder):
    """What does not depend on the clock."""
    networks = json.loads((folder / "run" / "onnx" / "deployed.json").read_text())["networks"]
    return [{key: network[key] for key in ("name", "metrics", "bytes", "relative_error")} for network in networks]


@pytest.mark.slow
@pytest.mark.chapter("C18", api="lightning_distill.Pipeline")
@pytest.mark.parametrize("devices", [1, 2])
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(tmp_path, devices):
    straight = run(tmp_path / "straight", devices)
    assert straight.returncode == 0, straight.stderr
    for kill in KILLS:
        killed = run(tmp_path / "killed", devices, kill)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert kill.partition(":")[0] not in stages(tmp_path / "killed")
        assert not (tmp_path / "killed" / "run" / "onnx").exists()
    resumed = run(tmp_path / "killed", devices)
    assert resumed.returncode == 0, resumed.stderr
    expected, found = stages(tmp_path / "straight"), stages(tmp_path / "killed")
    assert sorted(found) == ["eight-bits", "fewer-channels", "low-rank", "recovered", "teacher"]
    for name, stage in expected.items():
        for key in ("weights", "metrics", "metric", "parameters", "bytes", "flops", "steps", "earlier"):
            assert found[name][key] == stage[key], (name, key)
        weights = load_file(tmp_path / "straight" / "run" / name / "student.safetensors")
        for key, value in load_file(tmp_path / "killed" / "run" / name / "student.safetensors").items():
            assert torch.equal(value, weights[key]), (name, key)
    assert expected["low-rank"]["parameters"] < expected["fewer-channels"]["parameters"]
    assert expected["fewer-channels"]["parameters"] < expected["teacher"]["parameters"] / 2
    assert deployed(tmp_path / "killed") == deployed(tmp_path / "straight")
    assert straight.stdout.count("ms for") == straight.stdout.count("Networks, checkpoints and plot") == 1
    assert {line.split()[0] for line in (tmp_path / "straight" / "steps.txt").read_text().splitlines()} == {
        str(rank) for rank in range(devices)
    }
