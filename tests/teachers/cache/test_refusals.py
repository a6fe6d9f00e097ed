"""Asking for what is not there, and writing what does not fit."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_distill.teachers.cache import CacheReader, CacheSpec, ShardWriter
from lightning_distill.top_k import encode_top_k
from tests.teachers.cache.samples import DENSE, TOP_K, dense, files_of, sequence, write_dense


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"teacher": "u"}, "`teacher` is 't', not 'u'"),
        ({"data": "e"}, "`data` is 'd', not 'e'"),
        ({"transform_seed": 0}, "`transform_seed` is 3, not 0"),
        ({"width": 6}, "`width` is 5, not 6"),
        ({"k": 64}, "`k` is 0, not 64"),
    ],
)
def test_another_cache_than_asked_for_is_refused(tmp_path, asked, message):
    write_dense(tmp_path, range(2))
    assert len(CacheReader(tmp_path, teacher="t", data="d", transform_seed=3, width=5)) == 2
    with pytest.raises(ValueError, match=message):
        CacheReader(tmp_path, **asked)


def test_a_writer_does_not_mix_caches(tmp_path):
    write_dense(tmp_path, range(2))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="`teacher` is 't', not 'u'; `transform_seed` is 3, not 9"):
        ShardWriter(tmp_path, replace(DENSE, teacher="u", transform_seed=9))
    assert files_of(tmp_path) == before


def test_missing_samples_are_named(tmp_path):
    write_dense(tmp_path, [2, 5, 7])
    reader = CacheReader(tmp_path)
    with pytest.raises(ValueError, match="has no sample 9; it holds 3 samples with ids from 2 to 7"):
        reader.read([2, 9])
    with pytest.raises(ValueError, match="has no sample 1 and 1 more of the 3 asked for"):
        reader.lengths([1, 2, 3])
    with pytest.raises(TypeError, match=r"`sample_ids` must be integers, got torch\.float32"):
        reader.read(torch.tensor([2.0]))


def test_a_cache_without_a_finished_shard_cannot_be_read(tmp_path):
    writer = ShardWriter(tmp_path, DENSE)
    writer.write(torch.tensor([0]), dense([0]))
    with pytest.raises(ValueError, match="holds no finished shard yet"):
        CacheReader(tmp_path)
    writer.close()
    assert len(CacheReader(tmp_path)) == 1


def test_a_mask_that_does_not_fit_is_refused(tmp_path):
    with ShardWriter(tmp_path, TOP_K) as writer:
        for i in range(4):
            writer.write(torch.tensor([i]), sequence(i))
    reader = CacheReader(tmp_path)
    with pytest.raises(ValueError, match="Sample 3 has 4 rows in the teacher cache, but `mask` marks 3"):
        reader.read([0, 3], mask=torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`mask` must be boolean, of shape \(2, T\)"):
        reader.read([0, 3], mask=torch.ones(2, 4))


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        (torch.zeros(3, 5), None, r"must have shape \(2, 5\)"),
        (torch.zeros(2, 4, 5), None, "`sequences` is False"),
        (torch.zeros(2, 6), None, r"must have a last dimension of 5, got shape \(2, 6\)"),
        (torch.zeros(2, 5), torch.ones(2, dtype=torch.bool), "given for sequences only"),
        (torch.tensor([[math.nan] * 5] * 2), None, "`values` must be finite in float32"),
        (encode_top_k(torch.zeros(2, 5), k=3), None, "is the top 3 at temperatures 1, 2, 4, but the cache is of kind"),
    ],
)
def test_a_writer_refuses_what_does_not_fit(tmp_path, values, mask, message):
    with ShardWriter(tmp_path, DENSE) as writer, pytest.raises(ValueError, match=message):
        writer.write(torch.tensor([0, 1]), values, mask=mask)
    assert not list(tmp_path.glob("shard-*"))


def test_a_value_beyond_half_precision_is_refused(tmp_path):
    with (
        ShardWriter(tmp_path, replace(DENSE, dtype="float16")) as writer,
        pytest.raises(ValueError, match=r"a value beyond 65504\. Use `dtype='float32'`"),
    ):
        writer.write(torch.tensor([0]), torch.full((1, 5), 7e4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sparse"}, "`kind` must be 'top_k', 'dense' or 'hidden', got 'sparse'"),
        ({"width": 0}, "`width` must be at least 1, got 0"),
        ({"dtype": "int8"}, "`dtype` must be one of float16, bfloat16, float32, got 'int8'"),
        ({"kind": "top_k", "k": 6}, r"`k` must be in \[1, 5\]"),
        ({"kind": "top_k", "k": 2, "temperatures": (-1.0,)}, "`temperatures` must be positive"),
    ],
)
def test_a_spec_checks_its_fields(arguments, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec(**{"kind": "dense", "width": 5, **arguments})


def test_a_writer_checks_its_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"`rank` must be in \[0, 99999\], got -1"):
        ShardWriter(tmp_path, DENSE, rank=-1)
    with pytest.raises(ValueError, match="`shard_items` must be at least 1, got 0"):
        ShardWriter(tmp_path, DENSE, shard_items=0)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 1]), r"`rows` must have shape \(n, 5\).*got items of shape \(3,\), 2 samples.* the sum 2"),
        (torch.tensor([3]), r"lengths of shape \(1,\) with the sum 3"),
    ],
)
def test_packed_rows_that_do_not_fit_their_lengths_are_refused(tmp_path, lengths, message):
    with ShardWriter(tmp_path, DENSE) as writer, pytest.raises(ValueError, match=message):
        writer.write_packed(torch.tensor([0, 1]), torch.zeros(3, 5), lengths)
