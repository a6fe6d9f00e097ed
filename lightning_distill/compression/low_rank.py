"""Layers as products of two smaller ones: from singular values, or from what the layers read."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.modes import inference, run_batch

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class LayerRank:
    """What became of a layer.

    Attributes:
        name: Its name in the network.
        shape: Of its weight as a matrix: outputs, inputs (of a convolution with the kernel).
        rank: Of its factors; ``None`` if it stayed, since factors would not be smaller.
        error: Root of the share of the squared weights, or outputs on ``batches``, that was lost; in [0, 1].
    """

    name: str
    shape: tuple[int, int]
    rank: int | None
    error: float

    @property
    def parameters(self) -> int:
        """Numbers in its weight now, without the bias."""
        rows, columns = self.shape
        return rows * columns if self.rank is None else self.rank * (rows + columns)


@dataclass(frozen=True)
class LowRankReport:
    """Layers that were looked at; ``str(report)`` is a table."""

    layers: tuple[LayerRank, ...]

    @property
    def before(self) -> int:
        """Weights of these layers before, without biases."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def after(self) -> int:
        """Weights of these layers now, without biases."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [
            f"{layer.name:{width}}  {'x'.join(map(str, layer.shape)):>12}  "
            + ("stays" if layer.rank is None else f"rank {layer.rank}, {layer.error:.1%} lost")
            for layer in self.layers
        ]
        return "\n".join([*rows, f"{self.after:,} of {self.before:,} weights"])


def largest_rank(rows: int, columns: int) -> int:
    """The largest rank whose factors have fewer numbers than the matrix: below ``rows * columns / (rows + columns)``.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> largest_rank(1024, 1024), largest_rank(1, 64)
        (511, 0)
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"`rows` and `columns` must be positive, got {rows} and {columns}.")
    return -(-rows * columns // (rows + columns)) - 1


def energy_rank(singular_values: Tensor, energy: float) -> int:
    """The smallest rank whose squared singular values are at least the share ``energy`` of all.

    Args:
        singular_values: In falling order, shape ``(r,)``.
        energy: In (0, 1].

    Raises:
        ValueError: If ``energy`` is outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValueError(f"`energy` must be in (0, 1], got {energy}.")
    kept = singular_values.double().square().cumsum(0)
    return int((kept < energy * kept[-1] * (1 - 1e-12)).sum()) + 1


def low_rank_factors(weight: Tensor, rank: int, *, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``left @ right`` of rank ``rank`` that is closest to ``weight``, or whose outputs are closest to its outputs.

    The product is ``weight`` projected onto its main left singular vectors (Eckart and Young 1936); with ``moments``
    those of ``weight @ moments^(1/2)``, which gives the least squared error of the outputs (as DRONE, Chen et
    al. 2021). Both factors get the same share of each singular value.

    Args:
        weight: Shape ``(m, n)``.
        rank: From 1 to ``min(m, n)``.
        moments: Second moments ``E[x x^T]`` of the inputs, not centred, shape ``(n, n)``. May be singular.

    Returns:
        ``left`` of shape ``(m, rank)`` and ``right`` of shape ``(rank, n)``, in ``weight``'s dtype.

    Raises:
        ValueError: If a shape or ``rank`` does not fit.
    """
    if weight.ndim != 2 or not 1 <= rank <= min(weight.shape):
        raise ValueError(
            f"`rank` must be from 1 to the smaller side of a matrix, got {rank} for shape {tuple(weight.shape)}."
        )
    vectors, _ = _spectrum(weight, moments)
    left = vectors[:, :rank]
    right = left.T @ weight.double()
    scale = right.norm(dim=1).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    return (left * scale).to(weight.dtype), (right / scale[:, None]).to(weight.dtype)


def factorize(
    network: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    parameters: float | None = None,
    skip: Sequence[str] = (),
    batches: Iterable[Any] | None = None,
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> LowRankReport:
    """Replace ``Linear``, ``Conv1d`` and ``Conv2d`` by two layers each, in place.

    A linear layer becomes ``Sequential(Linear(n, r), Linear(r, m))``, a convolution one with ``r`` outputs and one with
    kernel 1. Left alone: convolutions with groups, subclasses, shared weights, what ``nn.MultiheadAttention``
    reads past its layers, and layers so narrow that no factors are smaller.

    Args:
        network: Any network. Its parameters change: build the optimizer afterwards.
        rank: Of all layers, or by name of a layer (the others stay).
        energy: Share of the squared singular values that each layer keeps, in (0, 1]. A layer that needs too high
            a rank for that stays.
        parameters: Share of the weights to keep, in (0, 1), over all layers. The ranks are raised one by one, where the
            share of a layer's energy per weight is the largest. Exactly one of the three.
        skip: Names or patterns (``"blocks.*"``) of layers that stay.
        batches: A few batches of training data: then the outputs' error counts, not the weights'.
        run: Lets the network read a batch. Default: ``network(batch)``, ``network(*inputs)`` of ``(inputs..., labels)``
            with only the first one, or ``network(**batch)`` of a mapping.

    Raises:
        ValueError: If an argument is outside its range or names nothing, a rank would not save parameters, nothing can
            be factorized, or no batch came by a layer. The network is unchanged then.

    Example:
        >>> network = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> report = factorize(network, rank={"0": 4})
        >>> report.before, report.after, network[0][0].weight.shape
        (1024, 256, torch.Size([4, 32]))
    """
    if sum(value is not None for value in (rank, energy, parameters)) != 1:
        raise ValueError("Give exactly one of `rank`, `energy` and `parameters`.")
    layers = _candidates(network, skip)
    if isinstance(rank, Mapping):
        if unknown := [name for name in rank if name not in layers]:
            raise ValueError(f"`rank` names {unknown}, which cannot be factorized; there are {list(layers)}.")
        layers = {name: layers[name] for name in rank}
    if not layers:
        raise ValueError(f"{type(network).__name__} has no layer to factorize.")
    moments = {} if batches is None else _second_moments(network, layers, batches, run)
    values = {name: _spectrum(_matrix(layer), moments.get(name))[1] for name, layer in layers.items()}
    shapes = {name: _shape(layer) for name, layer in layers.items()}
    ranks: dict[str, int | None]
    if parameters is not None:
        ranks = dict(_within(values, shapes, parameters))
    elif energy is not None:
        needed = {name: energy_rank(value, energy) for name, value in values.items()}
        ranks = {name: r if r <= largest_rank(*shapes[name]) else None for name, r in needed.items()}
    else:
        assert rank is not None
        wanted = dict(rank) if isinstance(rank, Mapping) else dict.fromkeys(layers, rank)
        for name, value in wanted.items():
            if not 1 <= value <= largest_rank(*shapes[name]):
                raise ValueError(
                    f"Rank {value} does not make {name!r} of shape {shapes[name]} smaller: it must be from 1 to "
                    f"{largest_rank(*shapes[name])}. Choose such a rank or leave the layer out: `skip=[{name!r}]`."
                )
        ranks = {name: wanted[name] for name in layers}
    report = []
    for name, r in ranks.items():
        squares = values[name].square()
        lost = 0.0 if r is None else float(squares[r:].sum() / squares.sum().clamp_min(1e-300))
        report.append(LayerRank(name, shapes[name], r, math.sqrt(lost)))
        if r is not None:
            _replace(network, name, _factors(layers[name], r, moments.get(name)))
    for block in network.modules():  # whose fused inference reads weights of layers that are gone
        if isinstance(block, nn.TransformerEncoderLayer):
            block.activation_relu_or_gelu = 0
        if isinstance(block, nn.TransformerEncoder):
            block.use_nested_tensor = False
    return LowRankReport(tuple(report))


def factorized(
    network: nn.Module,
    rank: int | dict[str, int] | None = None,
    energy: float | None = None,
    parameters: float | None = None,
    skip: Sequence[str] = (),
) -> nn.Module:
    """``network`` after :func:`factorize`, for configurations: the student is then the teacher with smaller layers.

    With ``energy`` and ``parameters`` the ranks follow from the weights. A checkpoint of the student fits only if
    ``network`` comes with the same weights again, as :func:`~lightning_distill.teachers.load_network` gives it.
    """
    factorize(network, rank=rank, energy=energy, parameters=parameters, skip=skip)
    return network


def _candidates(network: nn.Module, skip: Sequence[str]) -> dict[str, Any]:
    users: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    found = {
        name: module
        for name, module in network.named_modules()
        if name and type(module) in _LAYERS and getattr(module, "groups", 1) == 1 and users[id(module.weight)] == 1
    }
    for pattern in skip:
        matching = [name for name in found if fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"`skip` has {pattern!r}, which fits no layer; there are {list(found)}.")
        for name in matching:
            del found[name]
    return {name: module for name, module in found.items() if largest_rank(*_shape(module)) >= 1}


def _matrix(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return weight.flatten(1)


def _shape(layer: Any) -> tuple[int, int]:
    rows, columns = _matrix(layer).shape
    return rows, columns


def _spectrum(weight: Tensor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of the weight, or of what it does to inputs; float64."""
    matrix = weight.detach().double()
    if moments is not None:
        if moments.shape != (matrix.shape[1], matrix.shape[1]):
            raise ValueError(f"`moments` must have shape {(matrix.shape[1],) * 2}, got {tuple(moments.shape)}.")
        values, vectors = torch.linalg.eigh(moments.double())
        matrix = matrix @ vectors * values.clamp_min(0).sqrt()
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return left, values


def _within(values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], share: float) -> dict[str, int]:
    """Ranks whose factors have at most ``share`` of the weights."""
    if not 0 < share < 1:
        raise ValueError(f"`parameters` must be in (0, 1), got {share}.")
    left = share * sum(math.prod(shape) for shape in shapes.values()) - sum(sum(shape) for shape in shapes.values())
    if left < 0:
        raise ValueError(f"`parameters` is {share}, but rank 1 everywhere needs more. Give more, or skip layers.")
    ranks = dict.fromkeys(values, 1)
    gains = {name: (value.square() / value.square().sum().clamp_min(1e-300)).tolist() for name, value in values.items()}
    queue = [(-gains[name][1] / sum(shapes[name]), name) for name in values if largest_rank(*shapes[name]) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if sum(shapes[name]) > left:
            continue
        ranks[name] += 1
        left -= sum(shapes[name])
        if ranks[name] < largest_rank(*shapes[name]):
            heapq.heappush(queue, (-gains[name][ranks[name]] / sum(shapes[name]), name))
    return ranks


def _factors(layer: Any, rank: int, moments: Tensor | None) -> nn.Sequential:
    """Two layers that compute what ``layer`` does, in its mode and with its bias."""
    left, right = low_rank_factors(_matrix(layer), rank, moments=moments)
    bias = layer.bias is not None
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    first: Any
    second: Any
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False, **like)
        second = nn.Linear(rank, layer.out_features, bias=bias, **like)
    else:
        kind = type(layer)
        same = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        first = kind(layer.in_channels, rank, bias=False, **same, **like)
        second = kind(rank, layer.out_channels, 1, bias=bias, **like)
    with torch.no_grad():
        first.weight.copy_(right.view_as(first.weight))
        second.weight.copy_(left.view_as(second.weight))
        if bias:
            second.bias.copy_(layer.bias)
    first.weight.requires_grad_(layer.weight.requires_grad)
    second.weight.requires_grad_(layer.weight.requires_grad)
    return nn.Sequential(first, second).train(layer.training)


def _replace(network: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, new)


def _second_moments(
    network: nn.Module, layers: Mapping[str, Any], batches: Iterable[Any], run: Callable[[nn.Module, Any], Any] | None
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def look(name: str) -> Callable[[Any, Any], None]:
        def hook(layer: Any, inputs: Any) -> None:
            read = _rows(layer, inputs[0]).double()
            sums[name] = sums.get(name, 0) + read.T @ read
            rows[name] = rows.get(name, 0) + len(read)

        return hook

    handles = [layer.register_forward_pre_hook(look(name)) for name, layer in layers.items()]
    try:
        with inference(network):
            for batch in batches:
                (run or run_batch)(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    if unseen := [name for name in layers if name not in sums]:
        raise ValueError(f"No batch came by the layers {unseen}. Give `batches` that use them, or `skip` them.")
    return {name: total / rows[name] for name, total in sums.items()}


def _rows(layer: Any, inputs: Tensor) -> Tensor:
    """What each output of a layer is computed from, shape ``(positions, inputs)``."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    sides = []
    for size, dilation, axis in zip(layer.kernel_size, layer.dilation, range(len(layer.kernel_size)), strict=True):
        total = dilation * (size - 1) if layer.padding == "same" else 0
        own = 0 if isinstance(layer.padding, str) else layer.padding[axis]
        sides.append((total // 2 + own, total - total // 2 + own))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(inputs, [side for pair in reversed(sides) for side in pair], mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):
        padded, kernel, stride, dilation = padded.unsqueeze(-2), (1, *kernel), (1, *stride), (1, *dilation)
    patches = F.unfold(padded, kernel, dilation=dilation, stride=stride)
    return patches.transpose(1, 2).flatten(0, 1)
