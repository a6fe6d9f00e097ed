"""What a teacher said, on disk: written once, read in any order by any number of processes."""

from lightning_distill.teachers.cache.fingerprint import data_fingerprint, fingerprint, teacher_fingerprint
from lightning_distill.teachers.cache.head import read_head, write_head
from lightning_distill.teachers.cache.reader import CacheReader
from lightning_distill.teachers.cache.shards import finished_ids
from lightning_distill.teachers.cache.signature import input_signature, same_input
from lightning_distill.teachers.cache.spec import DTYPES, CacheSpec, read_spec, require_same
from lightning_distill.teachers.cache.writer import ShardWriter

__all__ = [
    "DTYPES",
    "CacheReader",
    "CacheSpec",
    "ShardWriter",
    "data_fingerprint",
    "fingerprint",
    "finished_ids",
    "input_signature",
    "read_head",
    "read_spec",
    "require_same",
    "same_input",
    "teacher_fingerprint",
    "write_head",
]
