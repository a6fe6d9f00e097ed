"""Small networks to calibrate cost models with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Workload = tuple[nn.Module, Tensor]
"""A network and a batch for it."""
Network = tuple[nn.Module, tuple[int, ...], tuple[int, ...]]
"""A network, the shape of a sample for it, and sizes of batches."""


def calibration_networks() -> list[Network]:
    """Perceptrons, convolutional networks and transformers of several sizes."""
    work: list[Network] = []
    for sizes in ((64, 64, 10), (128, 256, 128, 10), (256, 512, 512, 10), (1024, 1024, 1024, 1024)):
        work.append((_mlp(sizes), (sizes[0],), (1, 4, 16, 64, 256)))
    for width in (48, 320):
        work.append((_mlp((width,) * 4, nn.GELU()), (width,), (1, 16, 128)))
        work.append((_mlp((width,) * 4, nn.LayerNorm(width)), (width,), (1, 16, 128)))
        work.append((_Attention(), (32, width), (1, 8)))
    for widths, kernel in (((8, 16), 3), ((16, 32, 64), 3), ((64, 96), 3), ((24, 40), 5), ((32, 64), 1)):
        work.append((_convolutional(widths, 2, kernel), (3, 24, 24), (1, 8, 32)))
    for widths, kernel in (((8, 16), 3), ((16, 32, 48), 5), ((24, 48, 24), 3), ((32, 64), 1)):
        work.append((_convolutional(widths, 1, kernel), (3, 64), (1, 16, 128)))
    work += [(_residual(24, 1), (3, 48), (1, 16, 128)), (_residual(48, 2), (3, 24, 24), (1, 8))]
    work += [(_separable(width), (3, 24, 24), (1, 8)) for width in (16, 64)]
    for width, depth, length in ((32, 1, 32), (64, 3, 8), (192, 2, 64), (96, 1, 128)):
        work.append((_Transformer(width, depth), (length, width), (1, 2, 8)))
    return work


def calibration_workloads() -> list[Workload]:
    """The same networks with their batches."""
    return [
        (network, torch.randn(batch, *shape)) for network, shape, batches in calibration_networks() for batch in batches
    ]


def _mlp(sizes: Sequence[int], between: nn.Module | None = None) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), between or nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _convolutional(widths: Sequence[int], dimensions: int, kernel: int) -> nn.Module:
    convolution, norm, _ = _LAYERS[dimensions]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((3, *widths)):
        first = convolution(inputs, outputs, kernel, stride=2, padding=kernel // 2, bias=False)
        layers += [first, norm(outputs), convolution(outputs, outputs, kernel, padding=kernel // 2)]
        layers += [nn.ReLU()] if kernel == 3 else []  # else the two would always come together
    return _classifier(layers, widths[-1], dimensions)


def _separable(width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return _classifier(layers, width, 2)


def _residual(width: int, dimensions: int) -> nn.Module:
    convolution = _LAYERS[dimensions][0]
    layers = [
        convolution(3, width, 3, padding=1),
        nn.ReLU(),
        _Residual(width, dimensions),
        _Residual(width, dimensions),
    ]
    return _classifier(layers, width, dimensions)


def _classifier(layers: list[nn.Module], width: int, dimensions: int) -> nn.Module:
    return nn.Sequential(*layers, _LAYERS[dimensions][2](1), nn.Flatten(), nn.Linear(width, 10))


class _Residual(nn.Module):
    def __init__(self, width: int, dimensions: int) -> None:
        super().__init__()
        convolution, norm, _ = _LAYERS[dimensions]
        self.first, self.second = (convolution(width, width, 3, padding=1) for _ in range(2))
        self.norm = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = F.relu(x + self.second(F.relu(self.norm(self.first(x)))))
        return said


class _Attention(nn.Module):
    """Three times attention of four heads, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (4, -1)).transpose(1, 2)
        for _ in range(3):
            heads = F.scaled_dot_product_attention(heads, heads, heads)
        return heads


class _Block(nn.Module):
    """Attention of linear layers, which can be quantized, and a perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        read = self.first(x)
        q, k, v = (part(read).unflatten(-1, (4, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        said: Tensor = x + self.mlp(self.second(x))
        return said


class _Transformer(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        said: Tensor = self.head(self.blocks(x).mean(dim=1))
        return said


_LAYERS = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.AdaptiveAvgPool1d),
    2: (nn.Conv2d, nn.BatchNorm2d, nn.AdaptiveAvgPool2d),
}
