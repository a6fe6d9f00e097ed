"""Time, size and exactness of quantized networks in ONNX Runtime, beside the same networks in float32.

    python scripts/benchmark_onnx.py --out runs/onnx.json

Three networks of more than a million parameters, trained for a moment so that their largest output is no accident, are
calibrated without further training and written with 8-bit inputs and weights, or with weights of 8, 4 or 2 bits alone.
All files of a network are timed in turns on one thread: the ratio of a round is that of the least times in it. Printed
are the median round, the least and the largest one, the bytes beside float32, and how the outputs compare with torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.networks import ConvNet2d
from lightning_distill.quantization import QuantSpec, calibrate, export_onnx, prepare
from lightning_distill.quantization.onnx_runtime import onnx_latencies

CLASSES = 10


class Attention(nn.Module):
    """Self-attention of four heads out of plain linear layers, which can be quantized."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = (part(tokens).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron of two layers, both behind a normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attention(self.first(tokens))
        return tokens + self.mlp(self.second(tokens))


class Transformer(nn.Module):
    """Three blocks over 64 tokens."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embed = nn.Linear(48, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))).mean(dim=1))


def perceptron(width: int = 1024) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


NETWORKS = {
    "mlp": (perceptron, (1024,)),
    "cnn": (lambda: ConvNet2d(widths=(64, 128, 256, 256), channels=3, size=32), (3, 32, 32)),
    "transformer": (Transformer, (64, 48)),
}
SPECS = {
    "w8a8": QuantSpec(8, 8),
    "w4a8": QuantSpec(4, 8),
    "w8": QuantSpec(8),
    "w4": QuantSpec(4),
    "w2": QuantSpec(2),
    "w2a8": QuantSpec(2, 8),
}
GOALS = {"mlp": 0.35, "cnn": 0.5, "transformer": 0.6}  # seconds of w8a8 beside float32


def samples(shape: tuple[int, ...], number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise around one prototype per class."""
    prototypes = torch.randn(CLASSES, *shape, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (number,), generator=generator)
    return prototypes[labels] + 2 * torch.randn(number, *shape, generator=generator), labels


def trained(name: str, steps: int) -> nn.Module:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    network = build()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    for step in range(steps):
        values, labels = samples(shape, 32, 100 + step)
        optimizer.zero_grad()
        F.cross_entropy(network(values), labels).backward()
        optimizer.step()
    return network.eval()


def operators(path: Path) -> dict[str, int]:
    """What ONNX Runtime computes after its own changes of the graph."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())


def measure(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    shape = NETWORKS[name][1]
    network = trained(name, args.steps)
    test, _ = samples(shape, args.samples, 1)
    known = [samples(shape, 64, 2)[0]]
    paths = {"float32": folder / f"{name}.onnx"}
    reports = {"float32": export_onnx(network, test, paths["float32"])}
    for label, spec in SPECS.items():
        if label not in args.specs or (name == "cnn" and spec.activations is None):
            continue  # no kernel of convolutions computes with weights of few bits alone
        student = prepare(copy.deepcopy(network), spec)
        calibrate(student, known)
        paths[label] = folder / f"{name}-{label}.onnx"
        # 2 bits without training say anything: how the two compute the same is the question
        reports[label] = export_onnx(student, test, paths[label], tolerance=1.0)
    found: list[dict[str, object]] = []
    for batch in args.batches:
        rounds: dict[str, list[float]] = {label: [] for label in paths}
        for _ in range(args.rounds):
            times = onnx_latencies(list(paths.values()), test[:batch].contiguous(), repeats=args.repeats)
            for label, taken in zip(paths, times, strict=True):
                rounds[label].append(min(taken) / min(times[0]))
            milliseconds = 1e3 * min(times[0])
        for label, report in reports.items():
            row = {
                "network": name, "what": label, "batch": batch, "float_ms": milliseconds,
                "time": median(rounds[label]), "least": min(rounds[label]), "largest": max(rounds[label]),
                "bytes": report.bytes / reports["float32"].bytes, "error": report.relative_error,
                "agreement": report.agreement, "operators": operators(paths[label]),
            }  # fmt: skip
            found.append(row)
            goal = f"  goal {GOALS[name]}" if label == "w8a8" else ""
            print(
                f"{name:12} {label:8} B={batch:<3} time {row['time']:.3f} ({row['least']:.3f} to {row['largest']:.3f})"
                f"  bytes {row['bytes']:.3f}  error {report.relative_error:.1e}  same maximum {report.agreement:.4f}"
                f"{goal}",
                flush=True,
            )
            if args.operators and batch == args.batches[0]:
                print("   ", row["operators"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--specs", nargs="+", choices=list(SPECS), default=list(SPECS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="runs of each file in a round")
    parser.add_argument("--steps", type=int, default=20, help="of training in float32")
    parser.add_argument("--samples", type=int, default=512, help="on which the outputs are compared")
    parser.add_argument("--operators", action="store_true", help="print what ONNX Runtime computes after its changes")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in args.networks for row in measure(name, args, Path(folder))]
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
