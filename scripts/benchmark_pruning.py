"""How much faster a network with fewer channels is on this machine's CPU, and what whole vectors are worth.

Networks of more than a million parameters lose channels to a share of a width that is a multiple of 16 (`keep`), and to
one channel more and one less (by layer). Eager PyTorch and ONNX Runtime (float32) compute the same batch in turns, one
thread, CPU time; every round gives one ratio to the whole network. Printed are the median ratio and, in brackets, its
quartiles. Every file is checked against its network when it is written.

    python scripts/benchmark_pruning.py --rounds 25 --batch 8
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from lightning_distill.compression import prune_channels
from lightning_distill.networks import MLP, ConvNet2d, ResNet1d
from lightning_distill.quantization import export_onnx
from lightning_distill.quantization.onnx_runtime import OnnxNetwork

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: MLP((256, 1024, 1024, 10)), (256,)),
    "ResNet1d": (lambda: ResNet1d((256, 256, 256)), (1, 40)),
    "ConvNet2d": (lambda: ConvNet2d((128, 256, 256), classes=10, channels=1, size=28), (1, 28, 28)),
}


def variants(network: nn.Module, example: Tensor, keep: float) -> dict[str, nn.Module]:
    """The network with a share of its channels in whole vectors of 16, and with one channel more and less per layer."""
    aligned = copy.deepcopy(network)
    channels = prune_channels(aligned, example, keep=keep, width=16).channels
    found = {"": aligned}
    for change in (1, -1):
        other = copy.deepcopy(network)
        prune_channels(other, example, keep={name: count + change for name, count in channels.items()})
        found[f"{change:+d}"] = other
    return found


def latencies(networks: Sequence[nn.Module], x: Tensor, rounds: int) -> list[list[float]]:
    """CPU seconds of a pass of each network, in turns."""
    times: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for _ in range(3 + rounds):
            for network, taken in zip(networks, times, strict=True):
                start = time.thread_time()
                network(x)
                taken.append(time.thread_time() - start)
    return [taken[3:] for taken in times]


def ratios(times: list[list[float]]) -> list[str]:
    """Median and quartiles of each one's ratio to the first, of the same round."""
    found = []
    for taken in times[1:]:
        shares = [one / whole for one, whole in zip(taken, times[0], strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        found.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="shares of the channels")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"batch {arguments.batch}, {arguments.rounds} rounds, one thread; ratios to the whole network")
    print(f"{'network':<10} {'keep':>5} {'channels':>8} {'parameters':>10}  {'eager':>18}  {'ONNX Runtime':>18}")
    for name in arguments.networks:
        build, shape = NETWORKS[name]
        whole, x = build().eval(), torch.randn(arguments.batch, *shape)
        size = sum(parameter.numel() for parameter in whole.parameters())
        found = {("", ""): whole}
        for keep in arguments.keep:
            found |= {(f"{keep:g}", change): net for change, net in variants(whole, x, keep).items()}
        networks = [network.eval() for network in found.values()]
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{number}.onnx" for number in range(len(networks))]
            for network, path in zip(networks, paths, strict=True):
                export_onnx(network, x, path)
            onnx = latencies([OnnxNetwork(path) for path in paths], x, arguments.rounds)
        eager = latencies(networks, x, arguments.rounds)
        first = 1000 * statistics.median(eager[0]), 1000 * statistics.median(onnx[0])
        print(f"{name:<10} {'whole':>5} {'':>8} {size:>10,}  {first[0]:>15.2f} ms  {first[1]:>15.2f} ms")
        rows = zip(list(found)[1:], networks[1:], ratios(eager), ratios(onnx), strict=True)
        for (keep_share, change), network, one, other in rows:
            parameters = sum(parameter.numel() for parameter in network.parameters())
            print(f"{'':<10} {keep_share:>5} {change or '16n':>8} {parameters / size:>10.2f}  {one:>18}  {other:>18}")


if __name__ == "__main__":
    main()
