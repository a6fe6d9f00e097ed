"""Damage to a cache is noticed."""

import json
import os

import numpy as np
import pytest
import torch

from lightning_distill.teachers.cache import CacheReader, ShardWriter
from lightning_distill.top_k import encode_top_k
from tests.teachers.cache.samples import TOP_K, assert_same, sequence

PLANES = ["samples", "lengths", "signatures", "ids", "deltas", "tail"]


@pytest.fixture
def cache(tmp_path):
    with ShardWriter(tmp_path / "cache", TOP_K, shard_items=10) as writer:
        for i in range(8):
            writer.write(torch.tensor([i]), sequence(i))
    return tmp_path / "cache"


@pytest.mark.parametrize("plane", PLANES)
def test_a_changed_byte_is_noticed_and_can_be_repaired(cache, plane):
    path = cache / "shard-00000-00001" / f"{plane}.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    expected = rf"damaged: .*shard-00000-00001/{plane}\.bin differs from its checksum\. Delete the folder"
    with pytest.raises(ValueError, match=expected):
        CacheReader(cache)

    for file in path.parent.iterdir():  # what the message says
        file.unlink()
    path.parent.rmdir()
    with ShardWriter(cache, TOP_K) as writer:
        for i in range(8):
            writer.write(torch.tensor([i]), sequence(i))
    expected = torch.cat([sequence(i)[0] for i in range(8)])
    assert_same(CacheReader(cache).read(range(8)), encode_top_k(expected, k=4, temperatures=(1.0, 2.0)))


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("verify", [True, False])
def test_missing_bytes_are_noticed_without_reading_all(cache, plane, verify):
    path = cache / "shard-00000-00000" / f"{plane}.bin"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ValueError, match=rf"{plane}\.bin has {size - 1} bytes instead of {size}"):
        CacheReader(cache, verify=verify)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{plane}\.bin has 0 bytes instead of {size}"):
        CacheReader(cache, verify=verify)


def test_lengths_are_checked_without_checksums(cache):
    path = cache / "shard-00000-00000" / "lengths.bin"
    lengths = np.fromfile(path, dtype=np.int64)
    (lengths + np.eye(len(lengths), dtype=np.int64)[0]).tofile(path)
    with pytest.raises(ValueError, match="does not add up to the rows of the shard"):
        CacheReader(cache, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda footer: {**footer, "cache": "x"}, "belongs to another cache or is changed"),
        (lambda footer: {**footer, "rows": footer["rows"] + 1}, "bytes instead of"),
        (lambda footer: {**footer, "blake2b": {}}, "differs from its checksum"),
        (lambda footer: {"cache": footer["cache"]}, r"cannot be read \('samples'\)"),
    ],
)
def test_a_changed_footer_is_noticed(cache, change, message):
    path = cache / "shard-00000-00000" / "footer.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message):
        CacheReader(cache)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"footer\.json cannot be read"):
        CacheReader(cache)


def test_a_manifest_of_another_version_or_damaged_is_refused(cache):
    path = cache / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ValueError, match="has format version 2, but this version of lightning-distill reads version 1"):
        CacheReader(cache)
    for content in ["{", "[]", "{}", json.dumps({**manifest, "kind": "sparse"}), json.dumps({**manifest, "new": 1})]:
        path.write_text(content)
        with pytest.raises(ValueError, match=r"The manifest .*manifest\.json of the teacher cache is damaged"):
            CacheReader(cache)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="There is no teacher cache in"):
        CacheReader(cache)
