"""A teacher is written down once, by any number of processes, killed or not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD, Outputs
from lightning_distill.callbacks import CacheWriter
from lightning_distill.modules import TeacherPrediction
from lightning_distill.tasks import Classification
from lightning_distill.teachers import FunctionTeacher, data_fingerprint, fingerprint
from lightning_distill.teachers.cache import CacheReader
from lightning_distill.top_k import encode_top_k
from tests.callbacks.cache_run import data, teacher, write

SCRIPT = Path(__file__).with_name("cache_run.py")
NEVER = 10**6


def expected(ids=range(50)):
    with torch.no_grad():
        return teacher()(data().splits.train[0][list(ids)])


@pytest.mark.chapter("C37", api="lightning_distill.callbacks.CacheWriter")
def test_all_samples_are_written_once_with_what_tells_them_apart(tmp_path):
    network = write(tmp_path / "cache", transform_seed=5)
    assert network.seen == 50
    reader = CacheReader(tmp_path / "cache")
    torch.testing.assert_close(reader.read(range(50)), expected())
    assert not reader.signatures(range(50)).isnan().any()
    assert reader.spec.teacher == fingerprint(teacher())
    assert reader.spec.data == data_fingerprint(data())
    assert reader.spec.transform_seed == 5
    assert not reader.spec.sequences


def test_the_top_k_at_the_wanted_temperatures(tmp_path):
    write(tmp_path / "cache", kind="top_k", k=2, temperatures=(1.0, 3.0))
    found, wanted = (
        CacheReader(tmp_path / "cache").read([3, 40]),
        encode_top_k(expected([3, 40]), k=2, temperatures=(1, 3)),
    )
    assert found.temperatures == (1.0, 3.0)
    assert found.classes == 3
    assert torch.equal(found.ids.int(), wanted.ids.int())
    torch.testing.assert_close(found.tail_logsumexp, wanted.tail_logsumexp)


def test_the_padding_of_a_vocabulary_is_left_out(tmp_path):
    write(tmp_path / "dense", vocabulary=2)
    torch.testing.assert_close(CacheReader(tmp_path / "dense").read([1]), expected([1])[:, :2])
    write(tmp_path / "top_k", kind="top_k", k=1, vocabulary=2)
    assert CacheReader(tmp_path / "top_k").spec.width == 2


def test_teacher_predictions_without_a_writer_hold_everything(make_trainer):
    said = make_trainer().predict(TeacherPrediction(teacher()), data().predict_dataloader())
    assert torch.cat([batch.index for batch in said]).tolist() == list(range(50))
    torch.testing.assert_close(torch.cat([batch.kept.logits for batch in said]), expected())


def test_a_finished_cache_costs_nothing_more(tmp_path):
    write(tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert write(tmp_path / "cache").seen == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == before


def run(folder, devices, kill_at):
    return subprocess.run(
        [sys.executable, "-m", "tests.callbacks.cache_run", folder, str(devices), str(kill_at)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=SCRIPT.parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_killed_job_computes_what_is_missing(tmp_path):
    killed = run(tmp_path / "cache", 1, 7)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(CacheReader(tmp_path / "cache")) == 28  # seven batches of four
    assert write(tmp_path / "cache").seen == 50 - 28
    torch.testing.assert_close(CacheReader(tmp_path / "cache").read(range(50)), expected())


@pytest.mark.slow
def test_two_processes_write_one_cache_and_one_resumes_it(tmp_path):
    killed = run(tmp_path / "cache", 2, 3)
    assert killed.returncode != 0, killed.stdout
    done = len(CacheReader(tmp_path / "cache"))
    assert 12 <= done <= 24  # two processes, three batches of four, or one of them was stopped earlier
    finished = run(tmp_path / "cache", 2, NEVER)
    assert finished.returncode == 0, finished.stderr
    seen = [int(line.split()[1]) for line in finished.stdout.splitlines() if line.startswith("seen")]
    assert len(seen) == 2
    assert 50 - done <= sum(seen) <= 52 - done + 8  # a batch that is finished in part is computed
    torch.testing.assert_close(CacheReader(tmp_path / "cache").read(range(50)), expected())
    shards = {path.name[:11] for path in (tmp_path / "cache").glob("shard-*")}
    assert shards == {"shard-00000", "shard-00001"}
    assert write(tmp_path / "cache").seen == 0


def test_an_error_keeps_what_was_written(tmp_path):
    class Breaks(type(teacher())):
        def forward(self, x):
            if self.seen >= 12:
                raise RuntimeError("out of memory")
            return super().forward(x)

    network = teacher()
    network.__class__ = Breaks
    with pytest.raises(RuntimeError, match="out of memory"):
        write(tmp_path / "cache", network=network, teacher="named")
    assert len(CacheReader(tmp_path / "cache")) == 12
    assert write(tmp_path / "cache", teacher="named").seen == 38


def test_files_are_finished_as_time_goes_by(tmp_path):
    write(tmp_path / "often", shard_minutes=0.0)
    write(tmp_path / "once")
    assert len(list((tmp_path / "often").glob("shard-*"))) == 13  # as many as batches
    assert len(list((tmp_path / "once").glob("shard-*"))) == 1


def test_a_cache_of_something_else_is_not_mixed_in(tmp_path):
    write(tmp_path / "cache")
    other = teacher()
    other[0].weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"holds something else than was asked for: `teacher` is '\w{32}', not"):
        write(tmp_path / "cache", network=other)
    with pytest.raises(ValueError, match=r"`data` is '\w{32}', not"):
        write(tmp_path / "cache", datamodule=data(items=49))
    with pytest.raises(ValueError, match="`transform_seed` is 0, not 1"):
        write(tmp_path / "cache", transform_seed=1)
    with pytest.raises(ValueError, match="`kind` is 'dense', not 'top_k'"):
        write(tmp_path / "cache", kind="top_k", k=2)
    assert other.seen == 0


def test_what_has_no_identity_needs_a_name(tmp_path):
    function = FunctionTeacher(lambda batch: batch[0][:, :3])
    with pytest.raises(ValueError, match=r"FunctionTeacher is no network whose weights could tell what it is\."):
        write(tmp_path / "cache", module=TeacherPrediction(function))
    write(tmp_path / "cache", module=TeacherPrediction(function), teacher="the inputs", data="mine")
    assert (CacheReader(tmp_path / "cache").spec.teacher, CacheReader(tmp_path / "cache").spec.data) == (
        "the inputs",
        "mine",
    )


def test_batches_need_an_index(make_trainer, tmp_path):
    x, y = data().splits.train
    trainer = make_trainer(callbacks=[CacheWriter(tmp_path / "cache", kind="dense")])
    with pytest.raises(ValueError, match=r"has no `index`.*`\(inputs, labels, index\)`"):
        trainer.predict(TeacherPrediction(teacher()), DataLoader(TensorDataset(x, y), batch_size=8))
    assert not (tmp_path / "cache").exists()


def test_one_data_set_per_cache(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[CacheWriter(tmp_path / "cache", kind="dense")])
    loaders = [data().predict_dataloader(), data().predict_dataloader()]
    with pytest.raises(ValueError, match="there are 2 prediction loaders"):
        trainer.predict(TeacherPrediction(teacher()), loaders)


def test_the_module_must_be_the_teacher_alone(make_trainer, tmp_path):
    trainer = make_trainer(callbacks=[CacheWriter(tmp_path / "cache", kind="dense")])
    with pytest.raises(TypeError, match=r"must be a `TeacherPrediction\(teacher, task\)`, got KD"):
        trainer.predict(KD(teacher(), alpha=1.0), data().predict_dataloader())
    with pytest.raises(ValueError, match="`teacher` is None"):
        TeacherPrediction(None)


def test_hidden_states_need_a_linear_output_layer(tmp_path):
    with pytest.raises(ValueError, match="`kind='hidden'` needs a teacher whose logits are a linear layer"):
        write(tmp_path / "cache", kind="hidden")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sparse"}, "`kind` must be 'top_k', 'dense' or 'hidden', got 'sparse'"),
        ({"k": 0}, "`k` must be in"),
        ({"temperatures": (0.0,)}, "`temperatures` must be positive"),
        ({"shard_minutes": -1.0}, "`shard_minutes` must not be negative, got -1"),
        ({"vocabulary": 0}, "`vocabulary` must be at least 1"),
        ({"vocabulary": 9, "kind": "hidden"}, "given for logits only, got 9 with kind='hidden'"),
    ],
)
def test_refuses_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheWriter(tmp_path, **arguments)


def test_sequences_of_one_length(tmp_path):
    class Tokens(Classification):
        def run(self, network, batch):
            return Outputs(network(batch[0].unflatten(1, (2, 2))))

    network = nn.Linear(2, 3)
    write(tmp_path / "cache", network=network, task=Tokens())
    reader = CacheReader(tmp_path / "cache")
    assert reader.spec.sequences
    with torch.no_grad():
        said = network(data().splits.train[0][[7]].unflatten(1, (2, 2)))
    torch.testing.assert_close(reader.read([7]), said[0])
