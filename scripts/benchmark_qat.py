"""What a training step costs with quantized layers, beside the same step in float32.

    python scripts/benchmark_qat.py --out runs/qat.json

A step is forward, loss, backward and AdamW, by hand, on one thread; the loss is cross-entropy, and for the transformer
distillation from a larger one, which speaks in every step. Variants run in turns; a round's ratio is that of the median
CPU seconds in it. Printed are the median round, the least and the largest one. ``float32 again`` says how far two equal
variants lie apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.losses import kl_divergence
from lightning_distill.networks import ConvNet2d
from lightning_distill.quantization import QuantSpec, calibrate, prepare

SPECS = {"w4": QuantSpec(4), "w8": QuantSpec(8), "w2a8": QuantSpec(2, 8), "w8a8": QuantSpec(8, 8)}


def perceptron(width: int = 1024) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convolutions() -> nn.Module:
    return ConvNet2d(widths=(32, 64, 128, 128), channels=3, size=32)


def llama(layers: int, width: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(vocab_size=4000, num_attention_heads=4, use_cache=False, **shape))


class Case(NamedTuple):
    """A network, something that it reads, and the loss of a step."""

    network: nn.Module
    inputs: Tensor
    loss: Callable[[nn.Module], Tensor]


def classifier(network: nn.Module, *shape: int) -> Case:
    values, labels = torch.randn(*shape), torch.randint(10, shape[:1])
    return Case(network, values, lambda student: F.cross_entropy(student(values), labels))


def taught(batch: int) -> Case:
    """A transformer of four layers that one of six, twice as wide, teaches: 128 tokens a sequence."""
    teacher, tokens = llama(6, 256).eval(), torch.randint(4000, (batch, 128))

    def loss(student: nn.Module) -> Tensor:
        with torch.no_grad():
            said = teacher(tokens).logits
        return kl_divergence(student(tokens).logits, said, temperature=2.0).mean()

    return Case(llama(4, 128), tokens, loss)


CASES: dict[str, tuple[Callable[[int], Case], tuple[int, ...]]] = {
    "mlp": (lambda batch: classifier(perceptron(), batch, 1024), (64, 256, 1024)),
    "cnn": (lambda batch: classifier(convolutions(), batch, 3, 32, 32), (32, 64)),
    "transformer": (taught, (4, 16)),
}


def step_of(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        loss(network).backward()
        optimizer.step()

    return step


def measure(name: str, batch: int, args: argparse.Namespace) -> list[dict[str, object]]:
    torch.manual_seed(0)
    network, inputs, loss = CASES[name][0](batch)
    steps = {"float32": step_of(network, loss), "float32 again": step_of(copy.deepcopy(network), loss)}
    for label in args.specs:
        student = prepare(copy.deepcopy(network), SPECS[label], skip=["*embed*"] if name == "transformer" else [])
        calibrate(student, [inputs])
        steps[label] = step_of(student.train(), loss)
        if args.compile:
            steps[f"{label} compiled"] = step_of(torch.compile(copy.deepcopy(student)), loss)
    if args.compile:
        steps["float32 compiled"] = step_of(torch.compile(copy.deepcopy(network)), loss)
    for step in steps.values():
        step()
        step()
    rounds: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(args.rounds):
        taken: dict[str, list[float]] = {label: [] for label in steps}
        for _ in range(args.repeats):
            for label, step in steps.items():
                start = time.process_time()
                step()
                taken[label].append(time.process_time() - start)
        for label, times in taken.items():
            rounds[label].append(median(times) / median(taken["float32"]))
        milliseconds = 1e3 * median(taken["float32"])
    print(f"{name}, batch of {batch}: {milliseconds:.1f} ms in float32")
    rows = []
    for label, ratios in rounds.items():
        row = {"network": name, "batch": batch, "what": label, "time": median(ratios)}
        rows.append(row | {"least": min(ratios), "largest": max(ratios), "float_ms": milliseconds})
        print(f"    {label:16} {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--specs", nargs="+", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each variant in a round")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in args.networks for batch in CASES[name][1] for row in measure(name, batch, args)]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
