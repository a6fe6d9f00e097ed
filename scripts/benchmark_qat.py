"""What a training step costs with quantized layers, beside the same step in float32.

    python scripts/benchmark_qat.py --out runs/qat.json

A step is forward, cross-entropy, backward and AdamW, by hand, on one thread. Its variants run in turns; a round's ratio
is that of the median CPU seconds in it. Printed are the median round, the least and the largest one. ``float32 again``
says how far two equal variants lie apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.networks import ConvNet2d
from lightning_distill.quantization import QuantSpec, calibrate, prepare

SPECS = {"w4": QuantSpec(4), "w8": QuantSpec(8), "w2a8": QuantSpec(2, 8), "w8a8": QuantSpec(8, 8)}


def perceptron(width: int = 1024) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convolutions() -> nn.Module:
    return ConvNet2d(widths=(32, 64, 128, 128), channels=3, size=32)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "mlp": (perceptron, (1024,), (64, 256, 1024)),
    "cnn": (convolutions, (3, 32, 32), (32, 64)),
}


def step_of(network: nn.Module, values: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(values), labels).backward()
        optimizer.step()

    return step


def measure(name: str, batch: int, args: argparse.Namespace) -> list[dict[str, object]]:
    build, shape, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = build()
    values, labels = torch.randn(batch, *shape), torch.randint(10, (batch,))
    steps = {"float32": step_of(network, values, labels)}
    steps["float32 again"] = step_of(copy.deepcopy(network), values, labels)
    for label in args.specs:
        student = prepare(copy.deepcopy(network), SPECS[label])
        calibrate(student, [values])
        steps[label] = step_of(student.train(), values, labels)
        if args.compile:
            steps[f"{label} compiled"] = step_of(torch.compile(copy.deepcopy(student)), values, labels)
    if args.compile:
        steps["float32 compiled"] = step_of(torch.compile(copy.deepcopy(network)), values, labels)
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
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--specs", nargs="+", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7, help="steps of each variant in a round")
    parser.add_argument("--compile", action="store_true", help="by torch.compile, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in args.networks for batch in NETWORKS[name][2] for row in measure(name, batch, args)]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
