"""A bit search inside a training: it changes nothing, is the same everywhere, and is not repeated."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader, IterableDataset

from lightning_distill import KD
from lightning_distill.bit_search import BitSearchResult, search_bits
from lightning_distill.callbacks import BitSearch
from lightning_distill.callbacks.bit_search import training_samples
from lightning_distill.cli import main
from lightning_distill.hardware import CostModel, count_costs
from lightning_distill.networks import ConvNet1d, NoisyInput
from lightning_distill.quantization import quantized_layers, size_report
from tests.callbacks.bit_search_run import data, module, quantized_module, search

SCRIPT = Path(__file__).with_name("bit_search_run.py")
API = "lightning_distill.callbacks.BitSearch"
QUIET = {"max_epochs": 2, "limit_val_batches": 0}


class Save(L.Callback):
    """Writes a checkpoint after some steps."""

    def __init__(self, path, steps):
        self.path = path
        self.steps = steps

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)


@pytest.mark.chapter("D16", api=API)
@pytest.mark.parametrize("start_step", [0, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_training_goes_on_as_if_nothing_had_been_searched(make_trainer, tmp_path, start_step, accumulate):
    plain, searched = noisy(), noisy()
    torch.manual_seed(0)
    make_trainer(**QUIET, accumulate_grad_batches=accumulate).fit(plain, datamodule=data())
    seen = []

    def look(student, plan):
        seen.append((plan, copy.deepcopy(student)))

    callback = search(tmp_path, start_step=start_step, apply=look)
    trainer = make_trainer(**QUIET, accumulate_grad_batches=accumulate, callbacks=[callback])
    torch.manual_seed(0)
    trainer.fit(searched, datamodule=data())
    ours, theirs = searched.student.state_dict(), plain.student.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    ((plan, student),) = seen
    assert plan == callback.result.plan
    assert callback.result.effective_bits <= 4.0
    samples = training_samples(data_loader(), 32)
    assert search_bits(student, samples, effective_bits=4.0) == callback.result
    if start_step == 0:
        assert all(
            torch.equal(value, noisy().student.state_dict()[name]) for name, value in student.state_dict().items()
        )


def noisy():
    """A module whose training draws random numbers in every step."""
    found = module()
    return KD(NoisyInput(found.student), found.teacher, optimizer=found.optimizer_factory)


def data_loader():
    datamodule = data()
    datamodule.setup("fit")
    return DataLoader(datamodule.train_set, batch_size=8, collate_fn=lambda batch: batch)


def test_the_result_is_printed_written_and_plotted(make_trainer, tmp_path):
    callback = search(tmp_path / "plan")
    make_trainer(**QUIET, callbacks=[callback]).fit(module(), datamodule=data())
    written = json.loads((tmp_path / "plan" / "bits.json").read_text())
    assert BitSearchResult.from_dict(written) == callback.result
    assert (tmp_path / "plan" / "bits.png").stat().st_size > 10_000


@pytest.mark.parametrize("steps", [2, 4, 6, 7])
def test_a_resumed_run_is_an_uninterrupted_one_and_does_not_search_twice(make_trainer, tmp_path, steps):
    straight, second = module(), module()
    first, again = search(tmp_path / "first"), search(tmp_path / "again")
    saved = [first, Save(tmp_path / "step.ckpt", steps)]
    make_trainer(**QUIET, callbacks=saved).fit(straight, datamodule=data())
    trainer = make_trainer(**QUIET, callbacks=[again])
    trainer.fit(second, datamodule=data(), ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    assert again.result == first.result
    assert (tmp_path / "again").exists() == (steps < 4)
    ours, theirs = second.student.state_dict(), straight.student.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_two_processes_find_what_one_finds(make_trainer, tmp_path):
    alone = search(tmp_path / "alone")
    make_trainer(**QUIET, callbacks=[alone]).fit(quantized_module(), datamodule=data())
    command = [sys.executable, SCRIPT, tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (done.stderr + done.stdout).count("bits per weight (budget 4)") == 1
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    assert first["result"] == second["result"]
    assert first["result"]["plan"] == alone.result.plan
    assert first["result"]["loss"] == pytest.approx(alone.result.loss, rel=1e-3)  # gradients were summed otherwise
    assert all(torch.equal(first["student"][name], value) for name, value in second["student"].items())


def test_samples_come_from_the_data_set_and_leave_the_random_numbers_alone():
    loader = data_loader()
    state = torch.get_rng_state()
    batches = training_samples(loader, 20, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(batch[0]) for batch in batches] == [8, 8, 4]
    index = torch.cat([batch[2] for batch in batches])
    assert len(index.unique()) == 20
    assert torch.equal(index, torch.cat([batch[2] for batch in training_samples(loader, 20, seed=5)]))
    assert not torch.equal(index, torch.cat([batch[2] for batch in training_samples(loader, 20, seed=6)]))
    assert sum(len(batch[0]) for batch in training_samples(loader, 1000)) == 48

    class Endless(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ValueError, match=r"got list\. Pass `data`, batches to look at"):
        training_samples([1, 2], 20)
    with pytest.raises(ValueError, match="over a data set with a length"):
        training_samples(DataLoader(Endless()), 20)


def test_other_batches_may_be_looked_at(make_trainer, tmp_path):
    batches = [(torch.randn(16, 6), torch.zeros(16).long())]
    callback = search(tmp_path, data=batches, start_step=0)
    make_trainer(max_steps=1, limit_val_batches=0, callbacks=[callback]).fit(module(), datamodule=data())
    assert search_bits(module().student, batches, effective_bits=4.0) == callback.result


def test_bad_settings_are_refused_at_once(make_trainer):
    with pytest.raises(ValueError, match="which is below the fewest bits, 2"):
        BitSearch(effective_bits=1.0)
    with pytest.raises(ValueError, match="which is above float32"):
        BitSearch(effective_bits=33)
    with pytest.raises(ValueError, match="Give exactly one budget"):
        BitSearch()
    with pytest.raises(ValueError, match="`samples` must be at least 1, got 0"):
        BitSearch(effective_bits=4, samples=0)
    with pytest.raises(ValueError, match="`start_step` must be at least 0, got -1"):
        BitSearch(effective_bits=4, start_step=-1)
    with pytest.raises(ValueError, match="names 'stem', which is no"):
        make_trainer(**QUIET, callbacks=[BitSearch(effective_bits=4, layers=["stem"])]).fit(module(), datamodule=data())
    with pytest.raises(TypeError, match="but the module is a BoringModel"):
        make_trainer(**QUIET, callbacks=[BitSearch(effective_bits=4)]).fit(BoringModel())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("unit", ["bits", "seconds"])
def test_it_runs_from_the_command_line(tmp_path, monkeypatch, unit):
    monkeypatch.chdir(tmp_path)
    CostModel(bandwidth=1.0).save(tmp_path / "machine.json")  # a byte takes a second
    costs = count_costs(ConvNet1d((4, 4)), torch.zeros(64, 1, 40))
    others = sum(cost.bytes for cost in costs) - 4 * 500  # all but the 500 weights
    budgets = {"bits": "effective_bits: 3.0", "seconds": f"max_latency: {others + 190}, cost_model: machine.json"}
    (tmp_path / "fit.yaml").write_text(
        f"""
model:
  class_path: KD
  init_args:
    alpha: 1.0
    student: {{class_path: lightning_distill.networks.ConvNet1d, init_args: {{widths: [4, 4]}}}}
data: {{class_path: MNIST1DDataModule}}
trainer:
  accelerator: cpu
  max_steps: 2
  limit_val_batches: 0
  logger: false
  enable_progress_bar: false
  callbacks:
  - class_path: BitSearch
    init_args: {{{budgets[unit]}, bits: [2, 4, 8], samples: 64, folder: plan, refinement: greedy}}
"""
    )
    main(["fit", "-c", "fit.yaml"])
    found = json.loads((tmp_path / "plan" / "bits.json").read_text())
    assert list(found["plan"]) == ["blocks.0.0", "blocks.1.0", "head"]
    result = BitSearchResult.from_dict(found)
    assert result.unit == unit
    assert result.cost <= {"bits": 3.0, "seconds": others + 190}[unit]
    assert result.bytes <= {"bits": 3 * 500 / 8, "seconds": 190}[unit]


def test_a_quantized_student_gets_the_bits_and_goes_on_training(make_trainer, tmp_path):
    trained, callback = quantized_module(), search(tmp_path, effective_bits=3.0)
    count = sum(1 for _ in trained.parameters())
    make_trainer(**QUIET, callbacks=[callback]).fit(trained, datamodule=data())
    plan = {name: layer.weight_bits for name, layer in quantized_layers(trained.student).items()}
    assert plan == callback.result.plan
    assert min(plan.values()) < 8
    assert size_report(trained.student).average_bits <= 3.0
    assert sum(1 for _ in trained.parameters()) == count


@pytest.mark.parametrize("steps", [2, 5])
def test_a_resumed_quantized_run_has_the_bits_and_steps_of_an_uninterrupted_one(make_trainer, tmp_path, steps):
    straight, second = quantized_module(), quantized_module()
    saved = [search(tmp_path / "first"), Save(tmp_path / "step.ckpt", steps)]
    make_trainer(**QUIET, callbacks=saved).fit(straight, datamodule=data())
    trainer = make_trainer(**QUIET, callbacks=[search(tmp_path / "again")])
    trainer.fit(second, datamodule=data(), ckpt_path=tmp_path / "step.ckpt", weights_only=True)
    ours, theirs = second.student.state_dict(), straight.student.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
