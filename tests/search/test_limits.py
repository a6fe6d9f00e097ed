"""Trials whose student costs too much."""

import io

import lightning as L
import pytest
from rich.console import Console

from lightning_distill import KD
from lightning_distill.comparison import Experiment
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.hardware import CostModel
from lightning_distill.networks import MLP
from lightning_distill.search import Limits, search

WIDTHS = {"width": [4, 16, 64]}


def build(settings, seed):
    student = MLP((64, settings["width"], 10))
    trainer = {"max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu"}
    return Experiment(KD(student, alpha=1.0), DigitsDataModule(seed=seed), trainer)


def run(folder, limits, **settings):
    console = Console(file=io.StringIO(), width=160)
    found = search(build, WIDTHS, folder=folder, trials=6, limits=limits, pruner="none", console=console, **settings)
    return found, console.file.getvalue()


def size(width):
    return 4 * (65 * width + 10 * width + 10)


def test_a_trial_over_the_limit_is_not_trained_and_the_others_are_as_without_one(tmp_path):
    limited, printed = run(tmp_path / "a", Limits(bytes=size(16)))
    free, _ = run(tmp_path / "b", None, sampler="random")
    again, _ = run(tmp_path / "c", Limits(bytes=size(16)), sampler="random")
    assert {trial.state for trial in limited.trials} == {"complete", "pruned"}
    for trial in limited.trials:
        assert (trial.state == "pruned") == (trial.settings["width"] == 64)
        if trial.state == "pruned":
            assert trial.note == f"over the limits: bytes {size(64)}, limit {size(16)}"
            assert trial.values == ()
            assert f"trial {trial.number} pruned over the limits: bytes" in printed
            assert not (tmp_path / "a" / "trials" / f"trial{trial.number}").exists()
    assert [trial.settings for trial in again.trials] == [trial.settings for trial in free.trials]
    for trial, other in zip(again.trials, free.trials, strict=True):
        assert trial.values == (other.values if trial.settings["width"] < 64 else ())


def test_latency_and_energy_are_what_the_cost_model_says(tmp_path):
    machine = CostModel(throughput=1.0)
    machine.save(tmp_path / "machine.json")
    experiment = build({"width": 4}, 0)
    limits = Limits(latency=1.0, energy=1.0, samples=3, cost_model=str(tmp_path / "machine.json"))
    costs = limits.measure(experiment)
    assert costs["latency"] == 3 * 2 * (64 * 4 + 4 * 10)  # a second per operation
    experiment.datamodule.setup("fit")
    batch = [part[:3] for part in next(iter(experiment.datamodule.train_dataloader()))]
    assert costs["energy"] == pytest.approx(machine.estimate(experiment.module.student, batch).energy)
    assert limits.excess(costs) == "latency 1776, limit 1"
    assert Limits(latency=1776, cost_model="ideal").excess(costs) == ""


def test_other_limits_are_another_search(tmp_path):
    run(tmp_path, Limits(bytes=size(16)))
    with pytest.raises(ValueError, match="bytes"):
        run(tmp_path, Limits(bytes=size(64)))


def test_bad_limits_are_refused():
    cases = {
        r"must have at least one of \['bytes', 'latency', 'energy'\]": {},
        "`bytes` of the limits must be positive, got 0": {"bytes": 0},
        "`samples` of the limits must be positive, got 0": {"bytes": 1, "samples": 0},
        "A limit of latency needs a `cost_model`": {"latency": 1.0},
        "The cost model must be one of": {"latency": 1.0, "cost_model": "mine"},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            Limits(**settings)
    with pytest.raises(ValueError, match="LightningModule has no `student`"):
        Limits(bytes=1).measure(Experiment(L.LightningModule(), None, {}))
    with pytest.raises(ValueError, match="need a data module"):
        Limits(latency=1, cost_model="ideal").measure(Experiment(KD(MLP((2, 2)), alpha=1.0), None, {}))
