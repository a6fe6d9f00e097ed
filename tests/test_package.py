"""The package: public names, cheap import, one copy of each file."""

import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lightning_distill

ROOT = Path(__file__).parent.parent
ROOMS = [
    "",
    ".callbacks",
    ".comparison",
    ".compression",
    ".datamodules",
    ".diagnostics",
    ".layer_maps",
    ".losses",
    ".modules",
    ".search",
    ".selection",
    ".teachers",
    ".weighting",
    ".weighting.search",
]


@pytest.mark.parametrize("room", ROOMS)
def test_every_public_name_is_there(room):
    module = importlib.import_module(f"lightning_distill{room}")
    assert module.__all__
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert len(set(module.__all__)) == len(module.__all__)


def test_the_function_compare_stays_a_function_after_its_room_was_imported():
    importlib.import_module("lightning_distill.comparison")
    assert callable(lightning_distill.compare)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lightning_distill.nothing  # noqa: B018
    assert "KD" in dir(lightning_distill)


def loaded_by(statement):
    code = f"import sys; before = set(sys.modules); {statement}; print('\\n'.join(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_importing_the_package_imports_nothing_heavy():
    assert loaded_by("import lightning_distill") & {"torch", "lightning", "transformers", "peft", "wandb"} == set()


def test_a_module_does_not_import_what_it_does_not_use():
    heavy = {"peft", "optuna", "mnist1d", "sklearn", "wandb"}  # matplotlib is loaded by torchmetrics
    assert loaded_by("from lightning_distill import KD") & heavy == set()


@pytest.mark.parametrize("room", ["callbacks", "datamodules"])
def test_the_links_at_the_top_lead_to_the_rooms_and_cannot_be_imported(room):
    link = ROOT / room
    assert link.is_symlink()
    assert os.readlink(link) == f"lightning_distill/{room}"
    done = subprocess.run([sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True)
    assert f"import lightning_distill.{room}, not {room}" in done.stderr


@pytest.mark.slow
def test_the_wheel_holds_each_file_once(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "lightning_distill", source / "lightning_distill", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ("callbacks", "datamodules"):
        os.symlink(f"lightning_distill/{room}", source / room)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, source]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    held = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info" not in name]
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_distill").rglob("*.py")}
    assert sorted(held) == sorted({*package, "lightning_distill/py.typed"})
