"""What changing the layout of channels costs on this machine's CPU, against one convolution.

A batch of images goes into blocks of 16 channels and back (`to_nchwc`, `from_nchwc`), into `channels_last` and back,
and into a tensor of oneDNN (`x.to_mkldnn()`, a copy: its blocks are chosen inside the convolution). Beside it one 3x3
convolution computes with each, its weights being there already. All take turns, one thread, CPU time. Printed are times
over that of the contiguous convolution, of the same round: medians, and quartiles in brackets. All convolutions must
agree first.

    python scripts/benchmark_layout.py --rounds 25 --channels 64 256
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.utils import mkldnn

from lightning_distill.hardware import from_nchwc, to_nchwc


def actions(batch: int, channels: int, size: int, width: int) -> dict[str, Callable[[], object]]:
    """What is timed, the contiguous convolution first."""
    x = torch.randn(batch, channels, size, size)
    plain = nn.Conv2d(channels, channels, 3, padding=1).eval()
    last = nn.Conv2d(channels, channels, 3, padding=1).eval()
    last.load_state_dict(plain.state_dict())
    last = last.to(memory_format=torch.channels_last)
    dense = mkldnn.to_mkldnn(plain)
    x_last, x_dense, blocks = x.contiguous(memory_format=torch.channels_last), x.to_mkldnn(), to_nchwc(x, width)
    expected = plain(x)
    torch.testing.assert_close(last(x_last), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dense(x_dense).to_dense(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(from_nchwc(blocks, channels), x, rtol=0, atol=0)
    y_dense = dense(x_dense)
    return {
        "convolution, contiguous": lambda: plain(x),
        "convolution, channels_last": lambda: last(x_last),
        "convolution, oneDNN tensors": lambda: dense(x_dense),
        "to_nchwc": lambda: to_nchwc(x, width),
        "from_nchwc": lambda: from_nchwc(blocks, channels),
        "to channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "from channels_last": lambda: x_last.contiguous(),
        "x.to_mkldnn()": lambda: x.to_mkldnn(),
        "to_dense() of its output": lambda: y_dense.to_dense(),
    }


def seconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of a call in each round, the functions taking turns."""
    calls, found = {}, {name: list[float]() for name in functions}
    for name, function in functions.items():
        function()
        start = time.thread_time()
        function()
        calls[name] = max(int(0.01 / max(time.thread_time() - start, 1e-6)), 1)
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.thread_time()
            for _ in range(calls[name]):
                function()
            found[name].append((time.thread_time() - start) / calls[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=16, help="height and width of the images")
    parser.add_argument("--width", type=int, default=16, help="channels in a block of `to_nchwc`")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"batch {arguments.batch}, {arguments.size}x{arguments.size}, {arguments.rounds} rounds, one thread")
    with torch.no_grad():
        for channels in arguments.channels:
            times = seconds(actions(arguments.batch, channels, arguments.size, arguments.width), arguments.rounds)
            first = next(iter(times.values()))
            print(f"{channels} channels: contiguous convolution {1000 * statistics.median(first):.2f} ms")
            for name, taken in times.items():
                low, middle, high = statistics.quantiles([a / b for a, b in zip(taken, first, strict=True)], n=4)
                print(f"  {name:<30} {middle:>6.3f} ({low:.3f}-{high:.3f})", flush=True)


if __name__ == "__main__":
    main()
