"""The script that docs/scaling.md starts, on two CPU processes, as users start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "scale_text.py"


def start(folder, *options, torchrun):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if torchrun else []
    command = [sys.executable, *launcher, SCRIPT, "--accelerator", "cpu", "--devices", "2", "--save-every", "2"]
    done = subprocess.run(
        [*command, "--files", folder / "text.txt", "--folder", folder / "runs", "--length", "16", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LIGHTNING_DISTILL_CACHE": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "torchrun"), [("ddp", False), ("fsdp2", True)], ids=["Lightning starts ddp", "torchrun starts fsdp2"]
)
def test_trains_continues_and_exports(tmp_path, strategy, torchrun):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph number {i}: {i * i}, {i + 7}." for i in range(3000)))
    spread = ["--spread-teacher"] if strategy == "fsdp2" else []
    start(tmp_path, "--strategy", strategy, "--steps", "4", *spread, torchrun=torchrun)
    first = load_file(tmp_path / "runs" / "student.safetensors")
    said = start(tmp_path, "--strategy", strategy, "--steps", "6", *spread, torchrun=torchrun)
    assert "step=00000004.ckpt" in said.replace("\n", "")  # where it went on from
    second = load_file(tmp_path / "runs" / "student.safetensors")
    assert first.keys() == second.keys()
    assert any((first[name] - second[name]).abs().max() > 1e-5 for name in first)
    kept = {path.name for path in (tmp_path / "runs").glob("*.ckpt")}
    assert kept == {"step=00000004.ckpt", "step=00000006.ckpt"}  # Lightning keeps what a run began with


@pytest.mark.parametrize("name", ["ddp.sh", "fsdp2.sh", "deepspeed.sh", "fsdp2.slurm"])
def test_launch_scripts_name_options_that_there_are(name):
    path = ROOT / "scripts" / "launch" / name
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    options = {word for word in path.read_text().split() if word.startswith("--")}
    known = SCRIPT.read_text()
    of_launchers = {"--standalone", "--nproc-per-node", "--strategy"}
    of_slurm = {word for word in options if "=" in word or word == "--requeue"}
    assert all(f'"{option}"' in known for option in options - of_launchers - of_slurm)
