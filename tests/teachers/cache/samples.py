"""Caches to test with."""

import torch

from lightning_distill.teachers.cache import CacheSpec, ShardWriter
from lightning_distill.top_k import TopK

DENSE = CacheSpec("dense", width=5, teacher="t", data="d", transform_seed=3)
TOP_K = CacheSpec("top_k", width=50, k=4, temperatures=(1.0, 2.0), sequences=True)


def dense(ids):
    """Logits that depend on the sample id alone, shape (B, 5)."""
    return torch.stack([torch.sin(torch.arange(5) + 1.0 + 17 * i) for i in torch.as_tensor(ids).tolist()])


def sequence(i):
    """Logits of the tokens of sample ``i``, which has 1 to 7 of them, shape (1, T, 50)."""
    generator = torch.Generator().manual_seed(i)
    return 4 * torch.randn(1, 1 + i % 7, 50, generator=generator)


def write_dense(folder, ids, *, spec=DENSE, batch=3, **options):
    with ShardWriter(folder, spec, **options) as writer:
        for part in torch.as_tensor(ids).split(batch):
            writer.write(part, dense(part))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(first, second):
    assert type(first) is type(second)
    for a, b in zip(first[:3], second[:3], strict=True) if isinstance(first, TopK) else [(first, second)]:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
