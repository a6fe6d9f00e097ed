"""What goes into a cache comes out, in any order."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distill.teachers.cache import CacheReader, CacheSpec, ShardWriter
from lightning_distill.top_k import encode_top_k
from tests.teachers.cache.samples import DENSE, TOP_K, assert_same, dense, files_of, write_dense


@pytest.mark.chapter("C37")
@pytest.mark.parametrize("kind", ["dense", "hidden"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_returns_rows_as_they_were_written_in_any_order(tmp_path, kind, dtype):
    write_dense(tmp_path, range(20), spec=replace(DENSE, kind=kind, dtype=dtype), shard_items=7)
    reader = CacheReader(tmp_path)
    wanted = [13, 0, 19, 13, 6]
    assert_same(reader.read(wanted), dense(wanted).to(getattr(torch, dtype)))
    assert_same(reader.read(torch.tensor(wanted, dtype=torch.int32)), reader.read(wanted))
    assert reader.read([]).shape == (0, 5)
    assert len(reader) == 20
    assert reader.sample_ids.tolist() == list(range(20))


def test_returns_the_top_k_of_rows(tmp_path):
    logits = torch.randn(6, 30)
    with ShardWriter(tmp_path, CacheSpec("top_k", width=30, k=8)) as writer:
        writer.write(torch.arange(6), logits)
    assert_same(CacheReader(tmp_path).read([4, 1]), encode_top_k(logits[[4, 1]], k=8))


@pytest.mark.chapter("C37")
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "gaps"])
def test_returns_sequences_under_their_mask(tmp_path, side, encoded):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    if side == "left":
        mask = mask.flip(1)
    if side == "gaps":
        mask = mask[:, [0, 3, 1, 4, 2]]
    logits = torch.randn(4, 5, 50)
    whole = encode_top_k(logits, k=4, temperatures=(1.0, 2.0))
    with ShardWriter(tmp_path, TOP_K) as writer:
        writer.write(torch.tensor([3, 1, 4, 0]), whole if encoded else logits, mask=mask)
    reader = CacheReader(tmp_path)
    order = [2, 0, 3, 1]
    ids = torch.tensor([3, 1, 4, 0])[order]
    assert reader.lengths(ids).tolist() == mask[order].sum(1).tolist()
    padded, packed = reader.read(ids, mask=mask[order]), reader.read(ids)
    for found, rows, expected in zip(padded[:3], packed[:3], whole[:3], strict=True):
        expected = expected.to(torch.float32)[order]
        assert torch.equal(found.to(torch.float32), torch.where(mask[order].unsqueeze(-1), expected, 0))
        assert torch.equal(rows.to(torch.float32), expected[mask[order]])


def test_takes_at_most_270_bytes_per_token(tmp_path):
    with ShardWriter(tmp_path, CacheSpec("top_k", width=2048, sequences=True)) as writer:
        writer.write(torch.arange(4), torch.randn(4, 512, 2048))
    assert sum(len(content) for content in files_of(tmp_path).values()) / (4 * 512) <= 270


def test_default_spec_and_manifest_agree(tmp_path):
    write_dense(tmp_path, range(2))
    assert CacheReader(tmp_path).spec == DENSE
    assert replace(DENSE, k=3).address == DENSE.address
    changes = [{"teacher": "u"}, {"data": "e"}, {"transform_seed": 4}, {"dtype": "float16"}, {"kind": "hidden"}]
    assert len({DENSE.address, *(replace(DENSE, **change).address for change in changes)}) == 6


def test_a_pickled_reader_is_small_and_reads_the_same(tmp_path):
    write_dense(tmp_path, range(1000), batch=500)
    reader = CacheReader(tmp_path)
    copy = pickle.dumps(reader)
    assert len(copy) < 2000
    assert_same(pickle.loads(copy).read([999, 3]), reader.read([999, 3]))


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_data_loader_workers_read(tmp_path, start):
    write_dense(tmp_path, range(12), shard_items=5)
    reader = CacheReader(tmp_path)
    loader = DataLoader(range(12), batch_size=4, num_workers=1, collate_fn=reader.read, multiprocessing_context=start)
    assert_same(torch.cat(list(loader)), dense(range(12)))


def test_packed_rows_are_those_of_the_padded_ones(tmp_path):
    mask = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    logits, ids = torch.randn(3, 3, 50), torch.tensor([7, 2, 5])
    signatures = torch.randn(3, 4)
    with ShardWriter(tmp_path / "padded", TOP_K) as writer:
        writer.write(ids, logits, mask=mask, signatures=signatures)
    with ShardWriter(tmp_path / "packed", TOP_K) as writer:
        writer.write_packed(ids[:1], logits[:1][mask[:1]], mask[:1].sum(1), signatures=signatures[:1])
        writer.close()
    with ShardWriter(tmp_path / "packed", TOP_K) as writer:  # sample 7 is there already
        writer.write_packed(
            ids, encode_top_k(logits[mask], k=4, temperatures=(1.0, 2.0)), mask.sum(1), signatures=signatures
        )
    padded, packed = CacheReader(tmp_path / "padded"), CacheReader(tmp_path / "packed")
    assert_same(packed.read([5, 2, 7]), padded.read([5, 2, 7]))
    assert torch.equal(packed.signatures([5, 2, 7]), signatures[[2, 1, 0]])
    assert torch.equal(padded.signatures([5, 2, 7]), signatures[[2, 1, 0]])
    stored = sum(path.stat().st_size for path in (tmp_path / "packed").rglob("ids.bin"))
    assert stored == 5 * 4 * 2  # five rows of four ids: nothing twice


def test_a_cache_knows_what_it_holds_and_that_inputs_are_not_known(tmp_path):
    write_dense(tmp_path, [2, 5])
    reader = CacheReader(tmp_path)
    assert reader.holds([5, 2, 5])
    assert not reader.holds([2, 3])
    assert reader.signatures([5]).isnan().all()
