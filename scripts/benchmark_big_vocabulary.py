"""Time and memory of one step (value and gradients) of the big-vocabulary losses, beside other ways to compute them.

    python scripts/benchmark_big_vocabulary.py --vocabulary 32768 --tokens 2048 --width 512

Every variant computes ``T ** 2`` times the mean forward KL divergence from a teacher's hidden states (the cached rows:
from its top-64 probabilities) and the gradient of the student's hidden states and output layer. All must agree on the
value before anything is timed. On the CPU: time is CPU time of the process, the median over rounds in which the
variants take turns; memory is the growth of the peak resident set over the inputs, each variant in a fresh process. On
a GPU: events, and the allocator's peak. The plain loss runs twice, under two names: the difference is the noise.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_distill.losses.big_vocabulary import fused_linear_kd, fused_linear_kd_items, sparse_kd
from lightning_distill.losses.top_k import topk_kl

TEMPERATURE = 2.0
KEPT = 64
CHUNK = 256  # of the variants that take tokens in chunks but have no default of their own
Inputs = dict[str, Tensor]


def make_inputs(vocabulary: int, tokens: int, width: int, device: str) -> Inputs:
    """Student and teacher of the same width, and the teacher's top-k probabilities."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator)
    inputs = {
        "student_hidden": normal(tokens, width),
        "student_weight": normal(vocabulary, width) * 2 / width**0.5,
        "teacher_hidden": normal(tokens, width),
        "teacher_weight": normal(vocabulary, width) * 4 / width**0.5,
    }
    rows = []
    for chunk in inputs["teacher_hidden"].split(64):
        log_p = F.log_softmax(chunk @ inputs["teacher_weight"].T / TEMPERATURE, dim=-1)
        kept, ids = log_p.topk(KEPT, dim=-1)
        rows.append((kept, ids, torch.log1p(-kept.exp().sum(dim=-1))))
    inputs["log_probs"], inputs["ids"], inputs["tail"] = (torch.cat(parts) for parts in zip(*rows, strict=True))
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    inputs["student_hidden"].requires_grad_()
    inputs["student_weight"].requires_grad_()
    return inputs


def matrix_products(inputs: Inputs, teacher: bool = True) -> Tensor:
    """The products alone, without a loss: nothing that computes all gradients can be faster."""
    with torch.no_grad():
        hidden, weight = inputs["student_hidden"], inputs["student_weight"]
        tile = hidden.new_empty(CHUNK, len(weight))
        hidden.grad, weight.grad = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, start + CHUNK)
            out = tile[: len(hidden[rows])]
            if teacher:
                torch.mm(inputs["teacher_hidden"][rows], inputs["teacher_weight"].T, out=out)
            torch.mm(hidden[rows], weight.T, out=out)
            torch.mm(out, weight, out=hidden.grad[rows])
            weight.grad.addmm_(out.T, hidden[rows])
    return torch.tensor(torch.nan)


def plain(inputs: Inputs) -> Tensor:
    """``F.kl_div`` on whole matrices of logits."""
    student = inputs["student_hidden"] @ inputs["student_weight"].T
    with torch.no_grad():
        teacher = inputs["teacher_hidden"] @ inputs["teacher_weight"].T
    loss = F.kl_div(
        F.log_softmax(student / TEMPERATURE, dim=-1), F.softmax(teacher / TEMPERATURE, dim=-1), reduction="batchmean"
    )
    return _step(loss * TEMPERATURE**2)


def checkpointed_chunks(inputs: Inputs) -> Tensor:
    """The plain loss chunk by chunk under ``torch.utils.checkpoint``."""

    def chunk_loss(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Tensor:
        log_q = F.log_softmax(hidden @ weight.T / TEMPERATURE, dim=-1)
        p = F.softmax(teacher_hidden @ teacher_weight.T / TEMPERATURE, dim=-1)
        return F.kl_div(log_q, p, reduction="sum")

    chunks = zip(inputs["student_hidden"].split(CHUNK), inputs["teacher_hidden"].split(CHUNK), strict=True)
    losses = [
        checkpoint(chunk_loss, h, inputs["student_weight"], t, inputs["teacher_weight"], use_reentrant=False)
        for h, t in chunks
    ]
    return _step(torch.stack(losses).sum() * TEMPERATURE**2 / len(inputs["student_hidden"]))


def fused(inputs: Inputs, **options: float) -> Tensor:
    """``fused_linear_kd``."""
    result = fused_linear_kd(*_dense(inputs), temperature=TEMPERATURE, alpha=0.0, **options)  # type: ignore[arg-type]
    return _step(result.loss)


def fused_with_labels(inputs: Inputs) -> Tensor:
    """``fused_linear_kd`` with a cross-entropy of weight 1e-9, so that the value can be compared."""
    labels = inputs["ids"][:, 0]
    return _step(fused_linear_kd(*_dense(inputs), labels, temperature=TEMPERATURE, alpha=1e-9).loss)


def items(inputs: Inputs) -> Tensor:
    """``fused_linear_kd_items``, which recomputes."""
    return _step(fused_linear_kd_items(*_dense(inputs), temperature=TEMPERATURE).soft.mean())


def cached(inputs: Inputs) -> Tensor:
    """``sparse_kd``: a cached teacher."""
    target = inputs["ids"], inputs["log_probs"], inputs["tail"]
    student = inputs["student_hidden"], inputs["student_weight"]
    return _step(sparse_kd(*student, *target, temperature=TEMPERATURE, alpha=0.0).loss)


def cached_plain(inputs: Inputs) -> Tensor:
    """``topk_kl`` on the whole matrix of logits."""
    logits = inputs["student_hidden"] @ inputs["student_weight"].T
    target = inputs["ids"], inputs["log_probs"], inputs["tail"]
    return _step(topk_kl(logits, *target, temperature=TEMPERATURE).mean())


def liger(inputs: Inputs, chunk_size: int) -> Tensor:
    """``LigerFusedLinearJSDLoss``, not compiled; its divergence lacks the factor ``T ** 2``."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=False,
        chunk_size=chunk_size,
    )
    labels = torch.zeros(len(inputs["student_hidden"]), dtype=torch.long, device=inputs["student_hidden"].device)
    return _step(loss(*_dense(inputs), labels) * TEMPERATURE**2)


def trl(inputs: Inputs) -> Tensor:
    """``ChunkedDivergenceFunction`` of TRL; its divergence lacks the factor ``T ** 2``."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student_hidden, student_weight, teacher_hidden, teacher_weight = _dense(inputs)
    divergence, _ = ChunkedDivergenceFunction.apply(
        student_hidden, student_weight, None, teacher_hidden, teacher_weight, None, 0.0, TEMPERATURE
    )
    return _step(divergence.mean() * TEMPERATURE**2)


def _dense(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        inputs["student_hidden"],
        inputs["student_weight"],
        inputs["teacher_hidden"],
        inputs["teacher_weight"],
    )


def _step(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def variants() -> dict[str, Callable[[Inputs], Tensor]]:
    """All variants by name."""
    return {
        "4 matrix products only": matrix_products,
        "fused_linear_kd": fused,
        f"fused_linear_kd, chunks of {CHUNK}": partial(fused, chunk_size=CHUNK),
        "fused_linear_kd with labels": fused_with_labels,
        "fused_linear_kd_items": items,
        "plain": plain,
        "plain, again (noise)": plain,
        "checkpointed chunks": checkpointed_chunks,
        "3 matrix products only": partial(matrix_products, teacher=False),
        "sparse_kd, top 64": cached,
        "plain topk_kl, top 64": cached_plain,
        f"Liger, chunks of {CHUNK}": partial(liger, chunk_size=CHUNK),
        "Liger, chunks of 1024": partial(liger, chunk_size=1024),
        "TRL chunked divergence": trl,
    }


def available(names: list[str] | None) -> dict[str, Callable[[Inputs], Tensor]]:
    """The variants of these names (by default all) without those whose package is missing."""
    chosen = {name: variant for name, variant in variants().items() if not names or name in names}
    for peer, module in (("Liger", "liger_kernel.chunked_loss.jsd_loss"), ("TRL", "trl.kernels.chunked_divergence")):
        if any(name.startswith(peer) for name in chosen) and not _is_there(module):
            chosen = {name: variant for name, variant in chosen.items() if not name.startswith(peer)}
    return chosen


def _is_there(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer may fail to import in its own way; it is then no peer here
        print(f"{module} left out: {error!r}", file=sys.stderr)
        return False
    return True


def seconds(variant: Callable[[Inputs], Tensor], inputs: Inputs) -> float:
    """Time of one step, gradients included."""
    inputs["student_hidden"].grad = inputs["student_weight"].grad = None
    if inputs["student_hidden"].is_cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        variant(inputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.process_time()
    variant(inputs)
    return time.process_time() - begin


def peak_bytes(variant: Callable[[Inputs], Tensor], inputs: Inputs) -> int:
    """Growth of the peak over what the inputs take; call it in a fresh process, once."""
    if inputs["student_hidden"].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant(inputs)
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what making the inputs left in the heap would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = _status("VmRSS")
    variant(inputs)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def check_values(found: dict[str, Callable[[Inputs], Tensor]], inputs: Inputs) -> None:
    """All variants of a loss must return the same value."""
    for name, variant in found.items():
        if "products only" not in name:
            reference = cached_plain if "top 64" in name else plain
            torch.testing.assert_close(
                variant(inputs), reference(inputs), rtol=1e-4, atol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512, help="of the hidden states")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", help="names of the variants to run; all by default")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # used by the script itself, in a process of its own
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = arguments.vocabulary, arguments.tokens, arguments.width
    if arguments.memory_of:
        variant = variants()[arguments.memory_of]
        variant(make_inputs(1024, 256, 64, arguments.device))  # what is imported and set up at the first call
        print(peak_bytes(variant, make_inputs(*shape, arguments.device)))
        return

    found = available(arguments.only)
    check_values(found, make_inputs(1024, 256, 64, arguments.device))
    inputs = make_inputs(*shape, arguments.device)
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(arguments.rounds):
        for name, variant in found.items():
            times[name].append(seconds(variant, inputs))
    del inputs
    memory = {}
    for name in found:
        flags = ["--vocabulary", shape[0], "--tokens", shape[1], "--width", shape[2], "--device", arguments.device]
        command = [sys.executable, __file__, *map(str, flags), "--threads", str(arguments.threads), "--memory-of", name]
        memory[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    peers = {name: _version(name) for name in ("liger-kernel", "trl")}
    print(f"V={shape[0]} N={shape[1]} d={shape[2]}, torch {torch.__version__}, {arguments.threads} threads, {peers}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'variant':36} {'s (min-max)':>20} {'vs products':>12} {'vs plain':>9} {'MB':>7} {'vs plain':>9}")
    for name, median in medians.items():
        spread = f"{median:.2f} ({min(times[name]):.2f}-{max(times[name]):.2f})"
        ratios = [
            f"{table[name] / table[base]:.2f}" if base in table else "-"
            for table, base in ((medians, "4 matrix products only"), (medians, "plain"), (memory, "plain"))
        ]
        print(f"{name:36} {spread:>20} {ratios[0]:>12} {ratios[1]:>9} {memory[name] / 1e6:7.0f} {ratios[2]:>9}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
