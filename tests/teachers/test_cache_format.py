"""The storage of the teacher cache: what goes in comes out, whoever wrote it, and damage is noticed."""

import json
import math
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill.teachers.cache_format import (
    CacheReader,
    CacheSpec,
    CacheWriter,
    TopK,
    decode_top_k,
    encode_top_k,
    fingerprint,
    temperature_index,
)

TEMPERATURES = (0.05, 1.0, 2.0, 4.0, 1000.0)
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
    with CacheWriter(folder, spec, **options) as writer:
        for part in torch.as_tensor(ids).split(batch):
            writer.write(part, dense(part))


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(first, second):
    assert type(first) is type(second)
    for a, b in zip(first[:3], second[:3], strict=True) if isinstance(first, TopK) else [(first, second)]:
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# --- the top k and the tail ----------------------------------------------------------------------------------------


def tail_bucket_kl(student_logits, ids, log_p, tail_log_p, temperature):
    """KL between the distributions over the kept classes and "another class", in float64."""
    log_q = (student_logits / temperature).log_softmax(-1)
    dropped = log_q.scatter(-1, ids, -math.inf).logsumexp(-1)
    tail = tail_log_p.exp() * (tail_log_p - dropped)
    return temperature**2 * ((log_p.exp() * (log_p - log_q.gather(-1, ids))).sum(-1) + tail)


@pytest.mark.chapter("A70")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kept_classes_and_tail_are_those_of_the_softmax(temperature, dtype):
    logits = (4 * torch.randn(3, 7, 200)).to(dtype)
    found = decode_top_k(encode_top_k(logits, k=8, temperatures=TEMPERATURES), temperature=temperature)
    exact = log_softmax(logits.double().numpy() / temperature, axis=-1)
    order = np.argsort(-exact, axis=-1, kind="stable")
    kept = np.take_along_axis(exact, order[..., :8], axis=-1)
    tail = logsumexp(np.take_along_axis(exact, order[..., 8:], axis=-1), axis=-1)
    # Deltas below 16 in float16 are off by 2^-8 at most.
    np.testing.assert_allclose(found.log_probs, kept, atol=2**-7 / temperature)
    np.testing.assert_allclose(np.take_along_axis(exact, found.ids.numpy(), axis=-1), kept, rtol=1e-12)
    np.testing.assert_allclose(found.tail_log_prob, np.maximum(tail, -87.33), atol=max(2**-7 / temperature, 1e-5))
    np.testing.assert_allclose(
        found.log_probs.double().exp().sum(-1) + found.tail_log_prob.double().exp(), 1, rtol=1e-5
    )


def test_a_tail_far_below_the_rounding_of_the_kept_classes_is_still_exact():
    logits = torch.tensor([[0.0, -1.2345, *[-40.0] * 98]])  # the tail has 3e-16 of the mass
    found = decode_top_k(encode_top_k(logits, k=2, temperatures=[1.0]), temperature=1.0)
    exact = log_softmax(logits.double().numpy(), axis=-1)[0]
    assert found.tail_log_prob.item() == pytest.approx(logsumexp(exact[2:]), abs=1e-3)


@pytest.mark.chapter("A70")
@pytest.mark.erratum("ERR-27")
def test_tail_bucket_keeps_what_truncation_and_renormalising_lose():
    p, q = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]), torch.tensor([0.3, 0.3, 0.2, 0.1, 0.1]).double()
    found = decode_top_k(encode_top_k(p.log(), k=2, temperatures=[1.0]), temperature=1.0)
    kl = tail_bucket_kl(q.log(), found.ids, found.log_probs.double(), found.tail_log_prob.double(), 1.0)
    assert kl.item() == pytest.approx(0.08801516852582822, rel=2e-3)  # float16 deltas
    assert kl.item() < 0.09651012036559808  # the full KL: merging classes can only lose divergence
    everything = decode_top_k(encode_top_k(p.log(), k=5, temperatures=[1.0]), temperature=1.0)
    full = (everything.log_probs.exp() * (everything.log_probs - q.log()[everything.ids])).sum()
    assert full.item() == pytest.approx(0.09651012036559808, rel=2e-3)


def discounted(parent, concentration, draws):
    """An n-gram model with absolute discounting, of a sample around ``parent``: one row per context."""
    drawn = torch.distributions.Dirichlet((concentration * parent).clamp_min(1e-12)).sample()
    counts = torch.distributions.Multinomial(draws, probs=drawn).sample()
    return ((counts - 0.6).clamp_min(0) + 0.6 * (counts > 0).sum(-1, keepdim=True) * parent) / draws


@pytest.mark.chapter("A70")
@pytest.mark.parametrize(("temperature", "bound"), [(1.0, 0.01), (2.0, 0.02)])
def test_gradient_from_64_classes_is_close_to_that_of_all_32768(temperature, bound):
    """On interpolated n-grams over a Zipf vocabulary: the teacher sees the context, the student a shorter one."""
    words = torch.arange(1, 32769, dtype=torch.float64) ** -1.0
    short = discounted((words / words.sum()).expand(8, -1), 20, 1000)
    teacher = discounted(short.repeat_interleave(4, 0), 3, 20)
    student = (0.9 * short + 0.1 * words / words.sum()).repeat_interleave(4, 0).log().requires_grad_()
    log_p = (teacher.log() / temperature).log_softmax(-1)
    full = temperature**2 * (log_p.exp() * (log_p - (student / temperature).log_softmax(-1))).sum()
    (expected,) = torch.autograd.grad(full, student)

    def error(ids, log_probs, tail_log_prob):
        loss = tail_bucket_kl(student, ids, log_probs.double(), tail_log_prob.double(), temperature).sum()
        (gradient,) = torch.autograd.grad(loss, student)
        return ((gradient - expected).norm() / expected.norm()).item(), gradient

    found = decode_top_k(encode_top_k(teacher.log(), temperatures=[1.0, 2.0]), temperature=temperature)
    bucket, stored = error(*found)
    assert bucket <= bound
    renormalised, _ = error(found.ids, found.log_probs.log_softmax(-1), torch.full((32,), -700.0))
    assert renormalised > 10 * bucket
    # What storing adds to the choice of a tail bucket, whatever the distribution: the rounding of the deltas.
    top = log_p.topk(64)
    tail = log_p.scatter(-1, top.indices, -math.inf).logsumexp(-1)
    _, exact = error(top.indices, top.values, tail)
    assert (stored - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("classes", [1, 2, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_finite_at_the_extremes(dtype, classes):
    logits = torch.linspace(-1e4, 1e4, classes).to(dtype).repeat(2, 1)
    top_k = encode_top_k(logits, k=min(2, classes), temperatures=(0.01, 1.0, 1000.0))
    for temperature in top_k.temperatures:
        found = decode_top_k(top_k, temperature=temperature)
        assert torch.isfinite(found.log_probs).all()
        assert torch.isfinite(found.tail_log_prob).all()
        torch.testing.assert_close(found.log_probs.exp().sum(-1) + found.tail_log_prob.exp(), torch.ones(2))


def test_classes_ruled_out_have_no_mass():
    found = decode_top_k(encode_top_k(torch.tensor([0.0, -math.inf, 0.0, -math.inf]), k=3), temperature=2.0)
    assert set(found.ids[:2].tolist()) == {0, 2}
    torch.testing.assert_close(found.log_probs[:2].exp(), torch.tensor([0.5, 0.5]))
    assert found.log_probs[2].exp() == 0
    assert torch.isfinite(found.log_probs).all()  # so that p * log(p) is 0 and no NaN
    assert found.tail_log_prob.exp() < 1e-37


def test_large_batches_are_encoded_in_parts(monkeypatch):
    logits = torch.randn(3, 10, 40)
    whole = encode_top_k(logits, k=5)
    monkeypatch.setattr("lightning_distill.teachers.cache_format._CHUNK", {"cpu": 160})
    assert_same(encode_top_k(logits, k=5), whole)
    assert encode_top_k(logits[:0], k=5).ids.shape == (0, 10, 5)


@pytest.mark.parametrize(("classes", "dtype"), [(65536, torch.uint16), (65537, torch.int32)], ids=str)
def test_ids_take_two_bytes_up_to_65536_classes(tmp_path, classes, dtype):
    logits = torch.zeros(1, classes)
    logits[0, [-1, 40000, 3]] = torch.tensor([3.0, 2.0, 1.0])
    with CacheWriter(tmp_path, CacheSpec("top_k", width=classes, k=3)) as writer:
        writer.write(torch.tensor([0]), logits)
    read = CacheReader(tmp_path).read([0])
    assert read.ids.dtype == dtype
    assert decode_top_k(read, temperature=1.0).ids.tolist() == [[classes - 1, 40000, 3]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rejects_a_teacher_that_says_nothing(bad):
    with pytest.raises(ValueError, match="`logits` must be finite"):
        encode_top_k(torch.tensor([[0.0, 1.0], [bad, 0.0]]), k=1)
    with pytest.raises(ValueError, match="`logits` must be finite"):
        encode_top_k(torch.full((1, 3), -math.inf), k=1)


@pytest.mark.parametrize("k", [0, 6])
def test_rejects_k_outside_the_classes(k):
    with pytest.raises(ValueError, match=rf"`k` must be in \[1, 5\], the number of classes, got {k}"):
        encode_top_k(torch.zeros(1, 5), k=k)


@pytest.mark.parametrize("temperatures", [[], [0.0], [1.0, math.nan], [math.inf]], ids=str)
def test_rejects_impossible_temperatures(temperatures):
    with pytest.raises(ValueError, match="`temperatures` must be positive, and one at least, got"):
        encode_top_k(torch.zeros(1, 5), k=1, temperatures=temperatures)


def test_refuses_a_temperature_that_was_not_stored():
    top_k = encode_top_k(torch.zeros(1, 5), k=1)
    with pytest.raises(ValueError, match=r"must be one that the teacher's tail was stored at, 1, 2, 4, got 3\.0"):
        decode_top_k(top_k, temperature=3.0)
    with pytest.raises(ValueError, match="got nan"):
        decode_top_k(top_k, temperature=math.nan)
    assert temperature_index((1.0, 0.1), 0.1 + 1e-12) == 1


# --- round trips -----------------------------------------------------------------------------------------------------


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
    with CacheWriter(tmp_path, CacheSpec("top_k", width=30, k=8)) as writer:
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
    with CacheWriter(tmp_path, TOP_K) as writer:
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
    with CacheWriter(tmp_path, CacheSpec("top_k", width=2048, sequences=True)) as writer:
        writer.write(torch.arange(4), torch.randn(4, 512, 2048))
    assert sum(len(content) for content in files_of(tmp_path).values()) / (4 * 512) <= 270


def test_default_spec_and_manifest_agree(tmp_path):
    write_dense(tmp_path, range(2))
    assert CacheReader(tmp_path).spec == DENSE
    assert replace(DENSE, k=3).address == DENSE.address
    changes = [{"teacher": "u"}, {"data": "e"}, {"transform_seed": 4}, {"dtype": "float16"}, {"kind": "hidden"}]
    assert len({DENSE.address, *(replace(DENSE, **change).address for change in changes)}) == 6


# --- several writers, crashes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_read_depends_neither_on_ranks_nor_on_order(tmp_path, ranks):
    ids = torch.randperm(30)
    writers = [CacheWriter(tmp_path, TOP_K, rank=rank, shard_items=20) for rank in range(ranks)]
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
    with CacheWriter(tmp_path, replace(DENSE), rank=0) as writer:
        writer._skip = writer._skip[:0]  # as if both had begun at once
        writer.write(torch.tensor([2, 3]), dense([2, 3]) * 1.001)  # as another batch size changes it on a GPU
    reader = CacheReader(tmp_path)
    assert reader.sample_ids.tolist() == [0, 1, 2, 3]
    assert_same(reader.read([2]), dense([2]) * 1.001)  # the lower rank's, who wrote last


@pytest.mark.parametrize(("spec", "answer"), [(DENSE, lambda i: dense([i])), (TOP_K, sequence)], ids=["dense", "top_k"])
def test_two_different_answers_for_one_sample_are_refused(tmp_path, spec, answer):
    writers = [CacheWriter(tmp_path, spec, rank=rank) for rank in (0, 1)]
    for i, writer in enumerate(writers):
        writer.write(torch.tensor([5]), answer(7 * i))  # sequences 0 and 7 are of the same length
        writer.close()
    with pytest.raises(ValueError, match="holds two different answers for sample 5"):
        CacheReader(tmp_path)


def test_equal_answers_of_two_writers_are_merged(tmp_path):
    for rank in (0, 1):
        writer = CacheWriter(tmp_path, TOP_K, rank=rank)
        writer._skip = writer._skip[:0]
        writer.write(torch.tensor([5]), sequence(5))
        writer.close()
    assert len(CacheReader(tmp_path)) == 1


WRITE_AND_WAIT = """
import sys, time, torch
from lightning_distill.teachers.cache_format import CacheSpec, CacheWriter
writer = CacheWriter(sys.argv[1], CacheSpec("dense", width=5, teacher="t", data="d", transform_seed=3), shard_items=20)
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
    writer = CacheWriter(tmp_path / "killed", DENSE, shard_items=20)
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
    writer = CacheWriter(tmp_path, DENSE)
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
        with CacheWriter(tmp_path, DENSE) as writer:
            writer.write(torch.tensor([0]), dense([0]))
            raise KeyError("elsewhere")

    with pytest.raises(KeyError, match="elsewhere"):
        job()
    assert len(CacheReader(tmp_path)) == 1


# --- damage ----------------------------------------------------------------------------------------------------------

PLANES = ["samples", "lengths", "ids", "deltas", "tail"]


@pytest.fixture
def cache(tmp_path):
    with CacheWriter(tmp_path / "cache", TOP_K, shard_items=10) as writer:
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
    with CacheWriter(cache, TOP_K) as writer:
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


# --- asking for what is not there ------------------------------------------------------------------------------------


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
        CacheWriter(tmp_path, replace(DENSE, teacher="u", transform_seed=9))
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
    writer = CacheWriter(tmp_path, DENSE)
    writer.write(torch.tensor([0]), dense([0]))
    with pytest.raises(ValueError, match="holds no finished shard yet"):
        CacheReader(tmp_path)
    writer.close()
    assert len(CacheReader(tmp_path)) == 1


def test_a_mask_that_does_not_fit_is_refused(cache):
    reader = CacheReader(cache)
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
    with CacheWriter(tmp_path, DENSE) as writer, pytest.raises(ValueError, match=message):
        writer.write(torch.tensor([0, 1]), values, mask=mask)
    assert not list(tmp_path.glob("shard-*"))


def test_a_value_beyond_half_precision_is_refused(tmp_path):
    with (
        CacheWriter(tmp_path, replace(DENSE, dtype="float16")) as writer,
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
        CacheWriter(tmp_path, DENSE, rank=-1)
    with pytest.raises(ValueError, match="`shard_items` must be at least 1, got 0"):
        CacheWriter(tmp_path, DENSE, shard_items=0)


# --- processes -------------------------------------------------------------------------------------------------------


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


# --- fingerprints ----------------------------------------------------------------------------------------------------


def network(activation=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), activation(), nn.Linear(4, 2))


def test_fingerprint_is_that_of_the_contents():
    assert fingerprint(network()) == fingerprint(network())
    assert fingerprint(network().eval().requires_grad_(False)) == fingerprint(network())
    assert len(fingerprint(network())) == 32


def test_fingerprint_changes_with_a_weight_a_buffer_a_part_and_the_precision():
    weight, buffer = network(), network()
    weight[0].weight.data[1, 2] += 1e-6
    buffer[1].running_mean[0] = 1e-6
    others = [weight, buffer, network(nn.GELU), network().bfloat16(), network()[0]]
    assert len({fingerprint(other) for other in [network(), *others]}) == 6


def test_fingerprint_reads_the_configuration_but_not_where_it_came_from():
    class Configuration:
        def __init__(self, **fields):
            self.to_dict = lambda: fields

    def configured(**fields):
        module = network()
        module.config = Configuration(**fields)
        return fingerprint(module)

    assert configured(rope_theta=1e4, _name_or_path="here") == configured(rope_theta=1e4, _name_or_path="there")
    assert configured(rope_theta=1e4) != configured(rope_theta=1e6)


def test_fingerprint_needs_weights():
    with pytest.raises(ValueError, match=r"'0\.bias' is on the meta device"):
        fingerprint(network().to("meta"))
