"""Several writers, and writers that die."""

import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lightning_distill.teachers.cache import CacheReader, ShardWriter
from lightning_distill.top_k import encode_top_k
from tests.teachers.cache.samples import DENSE, TOP_K, assert_same, dense, files_of, sequence, write_dense


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_read_depends_neither_on_ranks_nor_on_order(tmp_path, ranks):
    ids = torch.randperm(30)
    writers = [ShardWriter(tmp_path, TOP_K, rank=rank, shard_items=20) for rank in range(ranks)]
    for position, i in enumerate(ids.tolist()):  # the writers take turns
        writers[position % ranks].write(torch.tensor([i]), sequence(i))
    for writer in reversed(writers):
        writer.close()
    reader = CacheReader(tmp_path)
    assert reader.sample_ids.tolist() == list(range(30))
    expected = torch.cat([sequence(i)[0] for i in range(29, -1, -1)])
    assert_same(reader.read(range(29, -1, -1)), encode_top_k(expected, k=4, temperatures=(1.0, 2.0)))


def test_samples_that_a_sampler_repeated_count_once(tmp_path):
    write_dense(tmp_path, [0, 1, 2], rank=1)
    with ShardWriter(tmp_path, replace(DENSE), rank=0) as writer:
        writer._skip = writer._skip[:0]  # as if both had begun at once
        writer.write(torch.tensor([2, 3]), dense([2, 3]) * 1.001)  # as another batch size changes it on a GPU
    reader = CacheReader(tmp_path)
    assert reader.sample_ids.tolist() == [0, 1, 2, 3]
    assert_same(reader.read([2]), dense([2]) * 1.001)  # the lower rank's, who wrote last


@pytest.mark.parametrize(("spec", "answer"), [(DENSE, lambda i: dense([i])), (TOP_K, sequence)], ids=["dense", "top_k"])
def test_two_different_answers_for_one_sample_are_refused(tmp_path, spec, answer):
    writers = [ShardWriter(tmp_path, spec, rank=rank) for rank in (0, 1)]
    for i, writer in enumerate(writers):
        writer.write(torch.tensor([5]), answer(7 * i))  # sequences 0 and 7 are of the same length
        writer.close()
    with pytest.raises(ValueError, match="holds two different answers for sample 5"):
        CacheReader(tmp_path)


def test_equal_answers_of_two_writers_are_merged(tmp_path):
    for rank in (0, 1):
        writer = ShardWriter(tmp_path, TOP_K, rank=rank)
        writer._skip = writer._skip[:0]
        writer.write(torch.tensor([5]), sequence(5))
        writer.close()
    assert len(CacheReader(tmp_path)) == 1


WRITE_AND_WAIT = """
import sys, time, torch
from lightning_distill.teachers.cache import CacheSpec, ShardWriter
writer = ShardWriter(sys.argv[1], CacheSpec("dense", width=5, teacher="t", data="d", transform_seed=3), shard_items=20)
for part in torch.arange(50).split(5):
    writer.write(part, torch.stack([torch.sin(torch.arange(5) + 1.0 + 17 * i) for i in part.tolist()]))
print("50 written", flush=True)
time.sleep(600)
"""


def test_a_killed_job_resumes(tmp_path):
    arguments = [sys.executable, "-c", WRITE_AND_WAIT, str(tmp_path / "killed")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "50 written\n"
        process.send_signal(signal.SIGKILL)
    unfinished = tmp_path / "killed" / "shard-00000-00002"
    assert unfinished.is_dir()
    assert not (unfinished / "footer.json").exists()
    assert len(CacheReader(tmp_path / "killed")) == 40
    writer = ShardWriter(tmp_path / "killed", DENSE, shard_items=20)
    assert writer.finished_ids().tolist() == list(range(40))
    assert not unfinished.exists()
    writer.close()
    write_dense(tmp_path / "killed", range(60), batch=7, shard_items=20)
    write_dense(tmp_path / "whole", range(60))
    killed, whole = CacheReader(tmp_path / "killed"), CacheReader(tmp_path / "whole")
    assert_same(killed.read(range(60)), whole.read(range(60)))
    stored = sum(path.stat().st_size for path in (tmp_path / "killed").rglob("values.bin"))
    assert stored == 60 * 5 * 4  # nothing twice


def test_resuming_with_other_ranks_writes_only_what_is_missing(tmp_path):
    write_dense(tmp_path, range(10), rank=3)
    before = files_of(tmp_path)
    write_dense(tmp_path, range(10), rank=0)
    assert files_of(tmp_path) == before
    write_dense(tmp_path, range(12), rank=0)
    assert CacheReader(tmp_path).sample_ids.tolist() == list(range(12))


def test_a_write_that_fails_half_way_is_never_published(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, DENSE)
    writer.write(torch.tensor([0]), dense([0]))
    writer.close()
    writer.write(torch.tensor([1]), dense([1]))
    file = writer._shard._files["values"]

    class Full:
        def write(self, _):
            raise OSError("No space left on device")

        def close(self):
            file.close()

    monkeypatch.setitem(writer._shard._files, "values", Full())
    with pytest.raises(OSError, match="No space left"):
        writer.write(torch.tensor([2]), dense([2]))
    writer.close()
    assert CacheReader(tmp_path).sample_ids.tolist() == [0]


def test_an_error_elsewhere_keeps_what_was_written(tmp_path):
    def job():
        with ShardWriter(tmp_path, DENSE) as writer:
            writer.write(torch.tensor([0]), dense([0]))
            raise KeyError("elsewhere")

    with pytest.raises(KeyError, match="elsewhere"):
        job()
    assert len(CacheReader(tmp_path)) == 1
