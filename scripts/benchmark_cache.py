"""What a teacher cache costs: bytes, tokens per second, and a step beside the student's own and a live teacher's.

Rules: main-process CPU time, one thread; variants take turns over several rounds, medians reported; the student's own
step runs twice, and the difference between the two is the noise floor; the cached and the live step must agree on the
loss (with all classes kept) before anything is timed.

    python scripts/benchmark_cache.py
    python scripts/benchmark_cache.py --vocabulary 8192 32768 --rounds 9
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import rich
import torch
from rich.table import Table
from torch import Tensor, nn

from lightning_distill import DistillationModule
from lightning_distill.losses import CrossEntropy, FusedCrossEntropy, FusedKD, SparseKD, fused
from lightning_distill.networks import from_config
from lightning_distill.tasks import CausalLM
from lightning_distill.teachers import CachedTeacher, FrozenTeacher
from lightning_distill.teachers.cache import CacheReader, CacheSpec, ShardWriter
from lightning_distill.teachers.cached import signature_of
from lightning_distill.top_k import TopK, encode_top_k

Batch = dict[str, Tensor]
K, LENGTH, SEQUENCES, PER_BATCH = 64, 512, 256, 8
TEMPERATURE, ALPHA = 2.0, 0.3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, k = {K}, medians of {options.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        storage(Path(folder), options.rounds)
    for vocabulary in options.vocabulary:
        with tempfile.TemporaryDirectory() as folder:
            steps(Path(folder), vocabulary, options.rounds)


# --- reading and writing ---------------------------------------------------------------------------------------------


def storage(folder: Path, rounds: int, vocabulary: int = 32768) -> None:
    """Bytes per token, and how many tokens are encoded, written and read in a second."""
    few = encode_top_k(torch.randn(4096, vocabulary), k=K)
    encode = seconds(lambda: encode_top_k(torch.randn(512, vocabulary), k=K), rounds)
    draw = seconds(lambda: torch.randn(512, vocabulary), rounds)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (SEQUENCES,))
    tokens = int(lengths.sum())
    rows = torch.arange(tokens) % 4096
    wide = few.ids.int()[rows].to(few.ids.dtype)  # indexing needs a dtype that torch supports
    everything = TopK(wide, few.deltas[rows], few.tail_logsumexp[rows], few.temperatures, vocabulary)
    begin = time.process_time()
    with ShardWriter(folder, CacheSpec("top_k", vocabulary, sequences=True, k=K)) as writer:
        writer.write_packed(torch.arange(SEQUENCES), everything, lengths)
    write = time.process_time() - begin
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    reader = CacheReader(folder)
    order = torch.randperm(SEQUENCES).split(PER_BATCH)
    places = torch.arange(LENGTH)
    right = [places < lengths[ids, None] for ids in order]
    left = [mask.flip(1) for mask in right]
    gaps = [mask[:, torch.randperm(LENGTH)] for mask in right]

    def read(masks: list[Tensor] | None) -> None:
        for number, ids in enumerate(order):
            reader.read(ids, mask=None if masks is None else masks[number])

    table = Table("", "million tokens per second", title=f"{tokens} tokens, {size / tokens:.0f} bytes each")
    table.add_row(f"encode {vocabulary} logits", f"{512 / (encode - draw) / 1e6:.3f}")
    table.add_row("write", f"{tokens / write / 1e6:.1f}")
    for name, masks in {"packed": None, "padded right": right, "padded left": left, "gaps": gaps}.items():
        read(masks)  # warms the page cache
        table.add_row(f"read, {name}", f"{tokens / seconds(lambda masks=masks: read(masks), rounds) / 1e6:.1f}")  # type: ignore[misc]
    rich.print(table)


# --- a step ----------------------------------------------------------------------------------------------------------


def steps(folder: Path, vocabulary: int, rounds: int) -> None:
    """Time of one step, cached and live, relative to the student alone."""
    torch.manual_seed(0)
    student, teacher = gpt(vocabulary, 128, layers=4), gpt(vocabulary, 256, layers=4)
    batch = {
        "input_ids": torch.randint(vocabulary, (4, 128)),
        "labels": torch.randint(vocabulary, (4, 128)),
        "index": torch.arange(4),
    }
    task = CausalLM()
    frozen = FrozenTeacher(teacher)
    write(folder / "some", frozen, task, batch, K)
    everything = min(vocabulary, 8192) == vocabulary
    if everything:
        write(folder / "all", frozen, task, batch, vocabulary)
    alone = step(student, None, FusedCrossEntropy(), batch)
    live = step(student, frozen, FusedKD(ALPHA), batch)
    cached = step(student, CachedTeacher(folder / "some"), SparseKD(ALPHA), batch)
    if everything:
        exact = step(student, CachedTeacher(folder / "all"), SparseKD(ALPHA), batch)
        torch.testing.assert_close(exact(), live(), rtol=2e-3, atol=0)
    variants = {
        "alone, plain loss": step(student, None, CrossEntropy(), batch),
        "alone": alone,
        "alone again (noise floor)": alone,
        "cached teacher": cached,
        "live teacher": live,
        "live teacher, plain loss": step(student, frozen, FusedKD(ALPHA), batch, fuse=False),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    for _ in range(rounds):
        for name, variant in variants.items():
            begin = time.process_time()
            variant()
            times[name].append(time.process_time() - begin)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = body(teacher) / body(student)
    title = (
        f"{vocabulary} classes, 512 tokens, student of {body(student) / 1e6:.1f} M, teacher {ratio:.1f} times larger"
    )
    table = Table("step", "ms", "of alone", "plain", "of the live teacher's", "plain", title=title)
    bases = ("alone", "alone, plain loss", "live teacher", "live teacher, plain loss")
    for name, value in medians.items():
        table.add_row(name, f"{value * 1e3:.0f}", *(f"{value / medians[base]:.3f}" for base in bases))
    rich.print(table)


def gpt(vocabulary: int, width: int, layers: int) -> nn.Module:
    """Random weights; widths 128 and 256 make bodies of 1 to 4."""
    sizes = {
        "vocab_size": vocabulary,
        "n_embd": width,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return from_config("gpt2", "causal-lm", {**sizes, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})


def body(network: nn.Module) -> int:
    """Parameters without embeddings and output layer, which are tied."""
    return sum(p.numel() for name, p in network.named_parameters() if "wte" not in name and "wpe" not in name)


def write(folder: Path, teacher: FrozenTeacher, task: CausalLM, batch: Batch, k: int) -> None:
    """What the teacher says about the batch, by sample."""
    said = teacher(batch, task)
    counts = task.counts(batch).sum(dim=1)
    spec = CacheSpec("top_k", said.logits.shape[-1], sequences=True, k=k, temperatures=(TEMPERATURE,))
    with ShardWriter(folder, spec) as writer:
        writer.write_packed(batch["index"], said.logits, counts, signatures=signature_of(batch, task))


def step(
    student: nn.Module,
    teacher: FrozenTeacher | CachedTeacher | None,
    term: nn.Module,
    batch: Batch,
    *,
    fuse: bool = True,
) -> Callable[[], Tensor]:
    """One optimizer step that leaves the weights as they are, so that all variants see the same ones."""
    module = DistillationModule(student, teacher, temperature=TEMPERATURE, terms={"kd": term}, task=CausalLM())
    optimizer = torch.optim.SGD(student.parameters(), lr=0.0)

    def run() -> Tensor:
        fused.PLAIN_BYTES = 0 if fuse else 2**62
        optimizer.zero_grad()
        loss, _ = module.loss(module.observe(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return run


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median CPU time."""
    times = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        times.append(time.process_time() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
