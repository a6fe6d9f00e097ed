"""Rounded weights, for looking at what a plan would do before anything is trained with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_distill.bit_search.allocate import weight_bits
from lightning_distill.quantization.spec import Bits, mean_bits

ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
BITS = range(2, 17)


@torch.no_grad()
def round_weight(weight: Tensor, bits: int, *, grid: int = 40) -> Tensor:
    """``weight`` rounded to ``2 ** bits - 1`` levels, symmetric around 0, with a step for each output channel.

    The step is the one with the least squared error on a grid between a fifth of the largest value and all of it: a few
    clipped values are worth smaller steps for the others.

    Args:
        weight: Output channels first, shape ``(C, ...)``.
        bits: From 2 to 16.
        grid: Steps that are tried, at least 1; the last one clips nothing.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: If ``bits`` or ``grid`` is out of range.

    Example:
        >>> round_weight(torch.tensor([[0.9, -1.1, 0.1]]), 2, grid=1)
        tensor([[ 1.1000, -1.1000,  0.0000]])
    """
    if bits not in BITS:
        raise ValueError(f"`bits` must be from {BITS[0]} to {BITS[-1]}, got {bits}.")
    if not grid >= 1:
        raise ValueError(f"`grid` must be at least 1, got {grid}.")
    rows = weight.detach().float().flatten(1) if weight.ndim > 1 else weight.detach().float()[:, None]
    levels = 2 ** (bits - 1) - 1
    largest = rows.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    best, least = rows, torch.full_like(largest, torch.inf)
    shares = torch.linspace(0.2, 1.0, grid).tolist() if grid > 1 else [1.0]
    for share in shares:
        step = largest * share / levels
        rounded = (rows / step).round().clamp(-levels, levels) * step
        error = (rounded - rows).square().sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, rounded, best), torch.minimum(error, least)
    return best.reshape(weight.shape).to(weight.dtype)


class RoundedWeights:
    """The weights of a network's layers at several numbers of bits, ready to be put in.

    Args:
        network: Not changed outside :meth:`applied`.
        bits: Numbers of bits to choose from.
        layers: Names of the layers; by default all linear, convolution and embedding layers.

    Attributes:
        sizes: Elements of each layer's weight, in the network's order.

    Raises:
        ValueError: If there is no such layer, layers share a weight, or ``bits`` are out of range.

    Example:
        >>> rounded = RoundedWeights(nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)), (2, 8))
        >>> rounded.sizes
        {'0': 8, '2': 6}
    """

    def __init__(self, network: nn.Module, bits: Sequence[int], layers: Sequence[str] | None = None) -> None:
        check_bits(bits)
        modules = {name: module for name, module in network.named_modules() if isinstance(module, ROUNDED)}
        chosen = chosen_layers(network, modules, layers, "linear, convolution or embedding layer")
        self._parameters = {name: cast(nn.Parameter, module.weight) for name, module in chosen.items()}
        owners: dict[int, str] = {}
        for name, parameter in self._parameters.items():
            if (other := owners.setdefault(id(parameter), name)) != name:
                raise ValueError(
                    f"{other!r} and {name!r} share one weight and need the same bits. Name one in `layers`."
                )
        self.bits = tuple(sorted(set(bits)))
        self._rounded = {
            (name, choice): round_weight(parameter, choice)
            for name, parameter in self._parameters.items()
            for choice in self.bits
        }

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each layer's weight."""
        return {name: parameter.numel() for name, parameter in self._parameters.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The layers' own weights."""
        return dict(self._parameters)

    @property
    def costs(self) -> dict[str, dict[int, float]]:
        """Bits of storage of each layer at each number of bits."""
        return weight_bits(self.sizes, self.bits)

    def rows(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the shape of a layer's weight as a matrix with a row for each output channel."""
        return weight.reshape(len(weight), -1)

    def changes(self, name: str) -> Tensor:
        """What rounding does to a layer's weight: shape ``(numbers of bits, channels, weights of a channel)``."""
        own = self.rows(name, self._parameters[name].detach())
        return torch.stack([self.rows(name, self._rounded[name, choice]) - own for choice in self.bits])

    def original(self) -> AbstractContextManager[None]:
        """Within this context the network computes in full precision, as it does outside :meth:`applied`."""
        return nullcontext()

    @contextmanager
    def applied(self, plan: Mapping[str, Bits]) -> Iterator[None]:
        """Within this context the network has the rounded weights of ``plan``; afterwards its own, bit for bit."""
        own = {name: parameter.data for name, parameter in self._parameters.items()}
        try:
            for name, choice in plan.items():
                self._parameters[name].data = of_channels(
                    choice, {bits: self._rounded[name, bits] for bits in self.bits}
                )
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data = own[name]


def check_bits(bits: Sequence[int]) -> None:
    """Refuse what is no choice of numbers of bits.

    Raises:
        ValueError: If there are fewer than two, or one is not a whole number from 1 to 32.
    """
    if len(set(bits)) < 2 or any(choice not in range(1, 33) for choice in bits):
        raise ValueError(f"`bits` must be two or more whole numbers from 1 to 32 to choose from, got {list(bits)}.")


Layer = TypeVar("Layer", bound=nn.Module)


def chosen_layers(
    network: nn.Module, known: Mapping[str, Layer], names: Sequence[str] | None, kind: str
) -> dict[str, Layer]:
    """Those of the layers ``known`` that are named, in the network's order; all for ``None``.

    Raises:
        ValueError: If there is none, or none of a name.
    """
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or list(known)[:3]
            raise ValueError(
                f"`layers` names {name!r}, which is no {kind} of {type(network).__name__}. Nearest names: {near}."
            )
    chosen = {name: layer for name, layer in known.items() if names is None or name in names}
    if not chosen:
        raise ValueError(f"{type(network).__name__} has no {kind} to search bits for.")
    return chosen


def of_channels(bits: Bits, choices: Mapping[int, Tensor]) -> Tensor:
    """Of tensors for numbers of bits, channels first, the one of ``bits``, or the channels that each has there."""
    if isinstance(bits, int):
        return choices[bits]
    own = torch.tensor(bits, device=choices[bits[0]].device)
    found = torch.empty_like(choices[bits[0]])
    for choice in set(bits):
        found[own == choice] = choices[choice][own == choice]
    return found


def effective_bits(plan: Mapping[str, Bits], sizes: Mapping[str, int]) -> float:
    """Mean number of bits per weight.

    Example:
        >>> effective_bits({"a": 2, "b": (8, 4)}, {"a": 300, "b": 100})
        3.0
    """
    return sum(sizes[layer] * mean_bits(bits) for layer, bits in plan.items()) / sum(sizes[layer] for layer in plan)


__all__ = [
    "BITS",
    "ROUNDED",
    "RoundedWeights",
    "check_bits",
    "chosen_layers",
    "effective_bits",
    "of_channels",
    "round_weight",
]
