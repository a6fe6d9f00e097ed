"""Three methods, and a comparison of them."""

import io

import pytest
from blobs import method
from rich.console import Console

from lightning_distill.comparison import compare


@pytest.fixture
def methods():
    return {"student alone": method(), "smoothed": method(label_smoothing=0.2), "wide": method(width=16)}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def run_compare(console, tmp_path):
    """``compare`` with the settings that most tests share."""

    def call(methods, **arguments):
        defaults = {"control": "student alone", "folder": tmp_path / "runs", "seeds": 2, "wandb": "off"}
        return compare(methods, **{"console": console, **defaults, **arguments})

    return call
