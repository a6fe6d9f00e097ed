"""CurriculumResampling in a Trainer: what is drawn, when it is measured, resume, two processes, YAML."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import CurriculumResampling
from lightning_distill.cli import main
from lightning_distill.curriculum import StagedCurriculum
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.sample_difficulty import TeacherDivergence
from lightning_distill.temperature import softened_entropy

SCRIPT = Path(__file__).with_name("curriculum_run.py")
X = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
Y = torch.arange(60) % 3


class Recorder(L.Callback):
    """Samples drawn in each epoch."""

    def __init__(self):
        self.drawn = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.drawn.append([])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn[-1] += batch[2].tolist()


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def fit(make_trainer, callback, epochs=3, module=None, data=None, **trainer):
    recorder = Recorder()
    module = module or KD(network(8, 1), network(16, 2))
    data = data or TensorDataModule((X, Y), batch_size=10)
    fitted = make_trainer(max_epochs=epochs, callbacks=[callback, recorder], limit_val_batches=0, **trainer)
    fitted.fit(module, datamodule=data)
    return recorder.drawn, module


@pytest.mark.chapter("C03", api="lightning_distill.callbacks.CurriculumResampling")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stages_draw_the_easy_samples_first_and_keep_the_length_of_epochs(make_trainer, num_workers):
    callback = CurriculumResampling(StagedCurriculum())
    data = TensorDataModule((X, Y), batch_size=10, num_workers=num_workers)
    drawn, module = fit(make_trainer, callback, data=data)
    difficulty = softened_entropy(module.teacher.network(X)).detach().double()
    torch.testing.assert_close(callback.difficulty, difficulty)
    order = difficulty.argsort().tolist()
    assert [len(epoch) for epoch in drawn] == [60, 60, 60]
    assert set(drawn[0]) == set(order[:20])
    assert set(drawn[1]) == set(order[:40])
    assert sorted(drawn[2]) == list(range(60))
    means = [difficulty[epoch].mean().item() for epoch in drawn]
    assert [entry["difficulty"] for entry in callback.history[:3]] == pytest.approx(means, rel=0.02)
    assert [entry["samples"] for entry in callback.history[:3]] == pytest.approx([1 / 3, 2 / 3, 1])


def test_other_orders(make_trainer):
    difficulty = torch.arange(60.0)
    hard, _ = fit(make_trainer, CurriculumResampling(StagedCurriculum(), difficulty, order="hard_first"))
    assert set(hard[0]) == set(range(40, 60))
    random, _ = fit(make_trainer, CurriculumResampling(StagedCurriculum(), difficulty, order="random"))
    assert [len(set(epoch)) for epoch in random] == [20, 40, 60]  # the same sizes
    assert set(random[0]) <= set(random[1])
    assert abs(sum(random[0]) / 60 - 29.5) < 12  # but no easier
    other, _ = fit(make_trainer, CurriculumResampling(StagedCurriculum(), difficulty, order="random", seed=1))
    assert set(other[0]) != set(random[0])


def test_divergence_is_measured_again_with_the_student_of_the_day(make_trainer):
    callback = CurriculumResampling(difficulty=TeacherDivergence(), refresh_every=2)
    seen = []

    class Spy(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(callback.difficulty.clone())
            assert pl_module.student.training

    recorder_module = KD(network(8, 1), network(16, 2), optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    trainer = make_trainer(max_epochs=4, callbacks=[callback, Spy()], limit_val_batches=0)
    trainer.fit(recorder_module, datamodule=TensorDataModule((X, Y), batch_size=10))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert seen[2].mean() < seen[0].mean()  # the student has learnt
    assert all(parameter.grad is None for parameter in recorder_module.teacher.network.parameters())


def test_progress_counts_steps_where_steps_end_the_training(make_trainer):
    callback = CurriculumResampling(StagedCurriculum(), torch.arange(60.0))
    recorder = Recorder()
    trainer = make_trainer(max_steps=18, callbacks=[callback, recorder], limit_val_batches=0)
    trainer.fit(KD(network(8, 1), network(16, 2)), datamodule=TensorDataModule((X, Y), batch_size=10))
    assert [len(set(epoch)) for epoch in recorder.drawn] == [20, 40, 60]


def test_dropped_samples_are_measured_but_not_drawn(make_trainer):
    data = TensorDataModule((X, Y), batch_size=10, num_labels=30, unlabelled=False)
    callback = CurriculumResampling()
    drawn, _ = fit(make_trainer, callback, data=data)
    kept = set(data.train_set.tensors[2].tolist())
    assert len(callback.difficulty) == 60
    assert set().union(*drawn) <= kept


def test_logs_and_plots(make_trainer, tmp_path):
    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    fit(make_trainer, CurriculumResampling(), logger=logger, log_every_n_steps=1)
    rows = Path(logger.log_dir, "metrics.csv").read_text()
    assert "curriculum/difficulty" in rows
    assert "curriculum/samples" in rows
    assert Path(logger.log_dir, "curriculum.png").stat().st_size > 5000


def run(folder, devices, workers, kill_at, refresh):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(SCRIPT), str(folder), *map(str, (devices, workers, kill_at, refresh))]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "workers", "kill_at", "refresh"),
    [(1, 0, 9, 0), (1, 2, 13, 0), (2, 0, 9, 0), (2, 0, 14, 2), (1, 0, 12, 1)],
)
def test_a_killed_run_continues_exactly(tmp_path, devices, workers, kill_at, refresh):
    done = run(tmp_path / "whole", devices, workers, -1, refresh)
    assert done.returncode == 0, done.stderr
    killed = run(tmp_path / "killed", devices, workers, kill_at, refresh)
    assert killed.returncode != 0
    resumed = run(tmp_path / "killed", devices, workers, -1, refresh)
    assert resumed.returncode == 0, resumed.stderr
    for rank in range(devices):
        whole, again = (torch.load(tmp_path / name / f"final-{rank}.pt") for name in ("whole", "killed"))
        assert whole["seen"][-len(again["seen"]) :] == again["seen"]
        for name, value in whole["student"].items():
            assert torch.equal(value, again["student"][name]), name
        assert torch.equal(whole["difficulty"], again["difficulty"])
        assert whole["history"] == again["history"]


def test_two_processes_draw_what_one_draws(tmp_path):
    one, two = (run(tmp_path / str(devices), devices, 0, -1, 0) for devices in (1, 2))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    alone = torch.load(tmp_path / "1" / "final-0.pt")
    ranks = [torch.load(tmp_path / "2" / f"final-{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(ranks[0]["difficulty"], alone["difficulty"])
    assert torch.equal(ranks[0]["difficulty"], ranks[1]["difficulty"])
    together = [sorted(a + b) for a, b in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True)]
    assert together == [sorted(batch) for batch in alone["seen"]]


@pytest.mark.filterwarnings("ignore")
def test_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    networks = {
        name: {"class_path": "lightning_distill.networks.MLP", "init_args": {"sizes": [64, width, 10]}}
        for name, width in (("student", 8), ("teacher", 16))
    }
    callback = {
        "class_path": "CurriculumResampling",
        "init_args": {
            "curriculum": {"class_path": "lightning_distill.curriculum.StagedCurriculum"},
            "difficulty": {"class_path": "lightning_distill.sample_difficulty.TeacherDivergence"},
            "order": "hard_first",
        },
    }
    trainer = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0}
    configuration = {
        "model": {"class_path": "KD", "init_args": networks},
        "data": {"class_path": "DigitsDataModule"},
        "trainer": trainer | {"callbacks": [callback], "logger": False, "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "-c", "run.yaml"])
    assert (tmp_path / "curriculum.png").exists()


def test_bad_arguments_are_refused(make_trainer):
    with pytest.raises(ValueError, match="`difficulty` must be one of entropy, divergence, or a function, got 'loss'"):
        CurriculumResampling(difficulty="loss")
    with pytest.raises(ValueError, match="`order` must be 'easy_first', 'hard_first' or 'random', got 'reverse'"):
        CurriculumResampling(order="reverse")
    with pytest.raises(ValueError, match="`refresh_every` must be at least 1 epoch, got 0"):
        CurriculumResampling(refresh_every=0)
    with pytest.raises(ValueError, match="`refresh_every` has no meaning for known difficulties"):
        CurriculumResampling(difficulty=torch.ones(3), refresh_every=1)
    with pytest.raises(
        TypeError, match="CurriculumResampling needs a `DistillationModule` such as `KD`, got BoringModel"
    ):
        make_trainer(callbacks=[CurriculumResampling()], max_steps=1).fit(BoringModel())
    with pytest.raises(ValueError, match="measures difficulty by the teacher, but there is none"):
        fit(make_trainer, CurriculumResampling(), module=KD(network(8, 1), alpha=1.0))
    loader = DataLoader(TensorDataset(X, Y), batch_size=10)
    with pytest.raises(ValueError, match="draws by weights, which NoneType cannot"):
        make_trainer(callbacks=[CurriculumResampling()], max_steps=1).fit(KD(network(8, 1), network(16, 2)), loader)
    with pytest.raises(ValueError, match=r"`weights` must have one entry per sample .* shape \(60,\), got \(3,\)"):
        fit(make_trainer, CurriculumResampling(difficulty=torch.arange(3.0)))


def test_samples_without_a_finite_difficulty_are_refused(make_trainer):
    teacher = network(16, 2)
    with torch.no_grad():
        teacher[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="60 of 60 samples have no finite difficulty"):
        fit(make_trainer, CurriculumResampling(), module=KD(network(8, 1), teacher))
