"""What blocks of zeros save on this machine's CPU: bytes of a file, and time only in some layouts.

One linear layer loses the 16x16 blocks of smallest norm. Side by side in the same run: the dense layer with its zeros,
torch's sparse layouts (BSR with the same blocks, as `matrix @ x.T` and in `F.linear`, and CSR), and a dense layer with
that share of its outputs cut away, as channel pruning gives. Every variant must say what the dense layer says before
anything is timed. Times are medians of CPU time of one thread over interleaved rounds, as ratios to the dense layer;
bytes are of files, over the dense one's. With `--training` it measures instead what the callback adds to a training
step while it looks at gradients.

    python scripts/benchmark_block_sparsity.py --size 1024 --rounds 15
    python scripts/benchmark_block_sparsity.py --size 1024 --rounds 7 --training
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import BlockSparsity
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.compression import block_mask, block_norms, block_size, element_mask, write_block_sparse
from lightning_distill.networks import MLP

NAMES = ("bsr", "bsr, F.linear", "csr", "fewer outputs, dense")
Variant = Callable[[Tensor], Tensor]


def sparse_layer(size: int, sparsity: float, block: tuple[int, int]) -> nn.Linear:
    """A layer without bias whose blocks of smallest norm are 0."""
    layer = nn.Linear(size, size, bias=False).requires_grad_(False)
    layer.weight[~element_mask(block_mask(block_norms(layer.weight, block), sparsity), (size, size), block)] = 0
    return layer


def variants(layer: nn.Linear, sparsity: float, block: tuple[int, int]) -> dict[str, Variant]:
    """Ways to compute the layer; the last one computes another layer of fewer outputs, for comparison."""
    weight = layer.weight
    bsr, csr = weight.to_sparse_bsr(block), weight.to_sparse_csr()
    kept = max(round(len(weight) * (1 - sparsity) / block[0]), 1) * block[0]
    fewer = weight[:kept].clone()
    return {
        "dense": lambda x: torch.nn.functional.linear(x, weight),
        "bsr": lambda x: (bsr @ x.T).T,
        "bsr, F.linear": lambda x: torch.nn.functional.linear(x, bsr),
        "csr": lambda x: (csr @ x.T).T,
        "fewer outputs, dense": lambda x: torch.nn.functional.linear(x, fewer),
    }


def seconds(functions: dict[str, Variant], x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each function, the functions taking turns."""
    calls = {}
    for name, function in functions.items():
        start = time.thread_time()
        function(x)
        calls[name] = max(int(0.02 / max(time.thread_time() - start, 1e-6)), 1)
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.thread_time()
            for _ in range(calls[name]):
                function(x)
            found[name].append((time.thread_time() - start) / calls[name])
    return {name: statistics.median(times) for name, times in found.items()}


def training_seconds(size: int, batch: int, callbacks: list[L.Callback]) -> float:
    """CPU seconds of 40 steps of a distillation between two networks with two such layers."""
    torch.manual_seed(0)
    samples = TensorDataset(torch.randn(40 * batch, size), torch.randint(0, 10, (40 * batch,)))
    module = KD(MLP((size, size, size, 10)), MLP((size, 64, 10)))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    start = time.thread_time()
    trainer.fit(module, DataLoader(samples, batch))
    return time.thread_time() - start


def compare_training(size: int, batches: list[int], blocks: list[tuple[int, int]], rounds: int) -> None:
    """Print the ratio of a training with the callback to one without, medians of interleaved rounds."""
    for batch in batches:
        found: dict[tuple[int, int] | None, list[float]] = {}
        for _ in range(rounds):
            for block in (None, *blocks):
                looks = [] if block is None else [BlockSparsity(0.75, block, skip=["head"], end_step=39)]
                found.setdefault(block, []).append(training_seconds(size, batch, looks))
        plain = statistics.median(found.pop(None))
        ratios = ", ".join(
            f"{'x'.join(map(str, block))} {statistics.median(times) / plain:.2f}"
            for block, times in found.items()
            if block is not None
        )
        print(
            f"batch {batch}: {1000 * plain / 40:.1f} ms a step without; with blocks of {ratios} times that", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024, help="inputs and outputs of the layer")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.75, 0.9, 0.95])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--isa", default="avx512", help="whose blocks")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--training", action="store_true", help="measure training steps instead")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if arguments.training:
        with quiet_lightning():
            compare_training(arguments.size, arguments.batches, [(1, 1), (4, 4), (16, 16)], arguments.rounds)
        return
    warnings.filterwarnings("ignore", message="Sparse (BSR|CSR) tensor support is in beta")
    block = block_size(arguments.isa)
    print(f"{arguments.size}x{arguments.size}, blocks of {block[0]}x{block[1]}, {arguments.rounds} rounds, one thread")
    print("sparsity  batch   bytes  " + "  ".join(f"{name:>20}" for name in NAMES))
    for sparsity in arguments.sparsities:
        layer = sparse_layer(arguments.size, sparsity, block)
        with tempfile.TemporaryDirectory() as folder:
            written = write_block_sparse(nn.Sequential(layer), Path(folder) / "layer.safetensors", block)
        ways = variants(layer, sparsity, block)
        for batch in arguments.batches:
            x = torch.randn(batch, arguments.size)
            expected = ways["dense"](x)
            for name in NAMES[:-1]:
                torch.testing.assert_close(ways[name](x), expected, rtol=1e-4, atol=1e-4)
            times = seconds(ways, x, arguments.rounds)
            columns = "  ".join(f"{times[name] / times['dense']:>20.2f}" for name in NAMES)
            print(f"{sparsity:>8.0%}  {batch:>5}  {written.ratio:>6.3f}  {columns}", flush=True)


if __name__ == "__main__":
    main()
