"""Channels that go together, and layers without some of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Side = Literal["out", "in", "both"]
Removal = dict[tuple[str, Side], set[int]]
"""Positions to remove, by name of a layer and side: its outputs, its inputs, or what it passes on."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Slice:
    """Where channels of a group lie in one layer.

    Attributes:
        name: The layer.
        side: Which side of it.
        positions: Indices on that side.
        channels: The group's channel that each of them belongs to.
    """

    name: str
    side: Side
    positions: tuple[int, ...]
    channels: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of one or several layers that can only be removed together.

    Attributes:
        name: First layer that makes them.
        layers: All layers that make them: those whose outputs are added, for one.
        channels: How many there are.
        units: The unit of each channel; a unit goes or stays as a whole (an attention head, or one channel of every
            group of a grouped convolution).
        slices: Where they lie.
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    units: tuple[int, ...]
    slices: tuple[Slice, ...]

    @property
    def per_unit(self) -> int:
        """Channels that a unit has."""
        return self.channels // (max(self.units) + 1)

    def removal(self, kept: Iterable[int]) -> Removal:
        """What goes if only the channels ``kept`` stay."""
        stay = set(kept)
        return {
            (part.name, part.side): {
                position for position, channel in zip(part.positions, part.channels, strict=True) if channel not in stay
            }
            for part in self.slices
        }


def together(removals: Iterable[Removal]) -> Removal:
    """Several removals as one."""
    found: Removal = {}
    for removal in removals:
        for key, positions in removal.items():
            found.setdefault(key, set()).update(positions)
    return found


def axes(layer: nn.Module, side: Side) -> dict[str, int] | None:
    """Tensors of ``layer`` with the axis of their channels on that side; ``None`` if it cannot be cut there."""
    kind = type(layer)
    found: dict[str, int] | None = None
    if isinstance(layer, nn.Linear) and kind is nn.Linear:
        found = {"out": {"weight": 0, "bias": 0}, "in": {"weight": 1}}.get(side)
    elif kind in _CONVOLUTIONS:
        depthwise = is_depthwise(layer)
        sides = (
            {"both": {"weight": 0, "bias": 0}} if depthwise else {"out": {"weight": 0, "bias": 0}, "in": {"weight": 1}}
        )
        found = sides.get(side)
    elif side == "both":
        if kind in (*_BATCH_NORMS, *_INSTANCE_NORMS):
            found = {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
        elif kind is nn.GroupNorm or (
            isinstance(layer, nn.LayerNorm) and kind is nn.LayerNorm and layer.weight.ndim == 1
        ):
            found = {"weight": 0, "bias": 0}
    return None if found is None else {key: axis for key, axis in found.items() if getattr(layer, key) is not None}


def is_depthwise(layer: Any) -> bool:
    """Whether every channel of a convolution is computed from one channel."""
    return bool(layer.groups == layer.out_channels == layer.in_channels > 1)


def local_positions(layer: Any, side: Side, removed: set[int]) -> set[int]:
    """Positions on the weight's axis: in grouped convolutions, inputs are counted within their group.

    Raises:
        ValueError: If the groups would lose different inputs, or different numbers of outputs.
    """
    groups = getattr(layer, "groups", 1)
    if groups == 1 or side == "both":
        return removed
    size = (layer.in_channels if side == "in" else layer.out_channels) // groups
    parts = [{position - size * group for position in removed if position // size == group} for group in range(groups)]
    if any(len(part) != len(parts[0]) for part in parts) or (side == "in" and any(part != parts[0] for part in parts)):
        raise ValueError("the groups of a convolution would lose different channels")
    return parts[0] if side == "in" else removed


def cut(network: nn.Module, removal: Removal) -> None:
    """Make the layers smaller, in place; their parameters are new ones."""
    for (name, side), removed in removal.items():
        layer: Any = network.get_submodule(name)
        found = axes(layer, side)
        assert found is not None
        gone = local_positions(layer, side, removed)
        for key, axis in found.items():
            tensor = getattr(layer, key)
            kept = torch.tensor([i for i in range(tensor.shape[axis]) if i not in gone], device=tensor.device)
            smaller = tensor.detach().index_select(axis, kept).contiguous()
            if isinstance(tensor, nn.Parameter):
                smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
            setattr(layer, key, smaller)
        _tell(layer, side, len(removed))


def mask(network: nn.Module, removal: Removal) -> None:
    """Let no layer read the channels, in place: the outputs become those of the network without them."""
    for (name, side), removed in removal.items():
        layer: Any = network.get_submodule(name)
        if side == "in":
            gone = torch.tensor(sorted(local_positions(layer, side, removed)), dtype=torch.long)
            with torch.no_grad():
                layer.weight.index_fill_(1, gone.to(layer.weight.device), 0.0)
        elif isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, _MaskedNorm(layer, removed))


def per_channel(layer: Any, side: Side, values: Tensor) -> Tensor:
    """Sums of ``values`` of a weight's shape over all that belongs to one channel of that side."""
    groups = getattr(layer, "groups", 1)
    if side != "in":
        return values.flatten(1).sum(1) if values.ndim > 1 else values
    split = values.unflatten(0, (groups, -1)).flatten(3) if values.ndim > 2 else values[None, :, :, None]
    return split.sum(dim=(1, 3)).flatten()


class _MaskedNorm(nn.Module):
    """A normalization over the channels that stay; the others become 0."""

    def __init__(self, norm: Any, removed: set[int]) -> None:
        super().__init__()
        self.norm = norm
        self.axis = 1 if isinstance(norm, nn.GroupNorm) else -1
        self.kept = [i for i in range(len(norm.weight)) if i not in removed]

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        norm, kept = self.norm, torch.tensor(self.kept, device=x.device)
        some = x.index_select(self.axis, kept)
        weight, bias = norm.weight[kept], None if norm.bias is None else norm.bias[kept]
        if self.axis == 1:
            some = F.group_norm(some, norm.num_groups, weight, bias, norm.eps)
        else:
            some = F.layer_norm(some, (len(kept),), weight, bias, norm.eps)
        return torch.zeros_like(x).index_copy(self.axis, kept, some)


def _tell(layer: Any, side: Side, removed: int) -> None:
    """Correct the numbers of channels that a layer keeps as attributes."""
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (layer.normalized_shape[0] - removed,)
        return
    counts: Mapping[str, tuple[str, ...]] = {
        "out": ("out_features", "out_channels"),
        "in": ("in_features", "in_channels"),
        "both": ("num_features", "num_channels", "in_channels", "out_channels", "groups"),
    }
    for key in counts[side]:
        if hasattr(layer, key):
            setattr(layer, key, getattr(layer, key) - removed)


def norm_groups(layer: Any) -> int:
    """Groups that must lose as many channels each: of a grouped convolution or a group normalization."""
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups
    return 1 if not hasattr(layer, "groups") or is_depthwise(layer) else int(layer.groups)
