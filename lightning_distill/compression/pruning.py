"""Students with fewer channels: the least important ones go, and what is left fills whole vectors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.compression.channel_graph import Run, channel_groups, check_removal
from lightning_distill.compression.channel_importance import magnitude_importance, taylor_importance
from lightning_distill.compression.channels import ChannelGroup, cut, together
from lightning_distill.hardware import CostModel, align_channels, cost_model, simd_width
from lightning_distill.hardware.alignment import Mode
from lightning_distill.quantization import quantized_layers
from lightning_distill.tasks import Classification, Task

Importance = Literal["magnitude", "taylor", "random"]
Scope = Literal["layer", "global"]
_COSTS = ("latency", "energy", "bytes", "flops")


@dataclass(frozen=True)
class PrunedLayer:
    """What became of channels that go together.

    Attributes:
        name: The first layer that makes them.
        layers: All layers that make them.
        before: Channels before.
        kept: The channels that stayed, in order.
        importance: Share of the importance that stayed, in [0, 1].
    """

    name: str
    layers: tuple[str, ...]
    before: int
    kept: tuple[int, ...]
    importance: float

    @property
    def after(self) -> int:
        """Channels now."""
        return len(self.kept)


@dataclass(frozen=True)
class PruningReport:
    """Layers that were looked at; ``str(report)`` is a table.

    Attributes:
        layers: Those whose channels may go.
        left: Why the channels of the other layers may not.
        before: Parameters of the network before.
        after: Parameters of the network now.
    """

    layers: tuple[PrunedLayer, ...]
    left: Mapping[str, str] = field(default_factory=dict)
    before: int = 0
    after: int = 0

    @property
    def channels(self) -> dict[str, int]:
        """Channels now, by layer: what ``keep`` takes to build the same shapes again."""
        return {layer.name: layer.after for layer in self.layers}

    def __str__(self) -> str:
        width = max(len(name) for name in (*(layer.name for layer in self.layers), *self.left))
        rows = [
            f"{layer.name:{width}}  {layer.before:>5} -> {layer.after:>5} channels, {layer.importance:.1%} of the "
            "importance" + (f"; with {', '.join(layer.layers[1:])}" if len(layer.layers) > 1 else "")
            for layer in self.layers
        ]
        rows += [f"{name:{width}}  stays: {reason}" for name, reason in self.left.items()]
        return "\n".join([*rows, f"{self.after:,} of {self.before:,} parameters"])


def prune_channels(
    network: nn.Module,
    example: Any,
    *,
    keep: float | Mapping[str, int] | None = None,
    max_cost: Mapping[str, float] | None = None,
    model: CostModel | str = "ideal",
    width: int | str = 8,
    bits: int = 32,
    mode: Mode = "floor",
    importance: Importance = "magnitude",
    scope: Scope = "layer",
    batches: Iterable[Any] | None = None,
    task: Task | None = None,
    skip: Sequence[str] = (),
    run: Run | None = None,
) -> PruningReport:
    """Remove the least important channels of linear and convolution layers, in place; the layers keep their classes.

    Layers whose channels are added, concatenated, normalized or flattened are cut together; which those are,
    :func:`channel_groups` finds and tries out. Outputs of the network stay, and whatever cannot be tried out; the
    report says why. Parameters are new ones: build the optimizer afterwards.

    Args:
        network: Any network of plain layers. Prune before you quantize or add an adapter.
        example: A batch that uses all layers, as ``network`` or ``run`` reads it.
        keep: Share of the channels, in (0, 1], then rounded to ``width``; or channels by layer, which are taken as they
            are (the others stay).
        max_cost: Instead of ``keep``: the largest ``latency`` (seconds), ``energy`` (joules) or ``flops`` for
            ``example``, or ``bytes`` (stored). The largest share that fits is found by bisection, in steps of one
            channel of all: fewer channels never cost more.
        model: Whose costs: a :class:`~lightning_distill.hardware.CostModel`, a preset's name or a file.
        width: Values per vector, or an instruction set: ``"neon"``, ``"avx2"``, ``"avx512"``. A layer keeps a multiple,
            at least one vector; a layer narrower than that stays.
        bits: Of a value, where ``width`` is an instruction set.
        mode: How to round: ``"floor"``, ``"nearest"`` or ``"ceil"``.
        importance: ``"magnitude"`` of the weights; ``"taylor"``, from gradients on ``batches``; or ``"random"``, a
            control that is the same in each call.
        scope: ``"layer"``: each keeps the same share. ``"global"``: the least important channels of the network go.
        batches: For ``"taylor"``: a few batches of training data with labels.
        task: How these are read. Default: :class:`~lightning_distill.Classification`.
        skip: Names or patterns (``"blocks.*"``) of layers whose channels stay.
        run: Lets the network read a batch. Default: ``network(batch)``, of a tuple only the first one, or
            ``network(**batch)`` of a mapping.

    Raises:
        ModuleNotFoundError: If torch-pruning is missing: the extra ``pruning``.
        ValueError: If an argument is outside its range or names nothing, no channels can go, the example does not use a
            layer, or no pruning is cheap enough. The network is unchanged then.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> report = prune_channels(network, torch.randn(2, 4), keep=0.5)
        >>> report.channels, network[2].weight.shape
        ({'0': 16}, torch.Size([3, 16]))
    """
    if (keep is None) == (max_cost is None):
        raise ValueError("Give exactly one of `keep` and `max_cost`.")
    if isinstance(keep, (int, float)) and not 0 < keep <= 1:
        raise ValueError(f"`keep` must be in (0, 1], got {keep}.")
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be 'layer' or 'global', got {scope!r}.")
    vector = simd_width(width, bits) if isinstance(width, str) else width
    align_channels(1, vector, mode=mode)  # checks both
    if quantized := list(quantized_layers(network)):
        raise ValueError(f"The layers {quantized} are quantized. Prune first, then quantize.")
    groups, left = channel_groups(network, example, run=run, skip=skip)
    if not groups:
        raise ValueError(f"{type(network).__name__} has no channels that can go: {left}.")
    values = _importances(network, groups, importance, batches, task)
    parameters = sum(parameter.numel() for parameter in network.parameters())

    def plan(share: float) -> dict[str, int]:
        return _plan(groups, values, share, scope, vector, mode)

    channels: Mapping[str, int]
    if max_cost is not None:
        report = cost_model(model) if isinstance(model, str) else model
        channels = _cheap_enough(network, groups, values, plan, max_cost, _estimates(report, example, run))
    elif isinstance(keep, Mapping):
        channels = _named(groups, left, keep)
    else:
        assert keep is not None
        channels = plan(keep)
    kept = {group.name: _kept(group, values[group.name], channels[group.name]) for group in groups}
    removal = together(group.removal(kept[group.name]) for group in groups)
    check_removal(network, removal, example, run=run)
    cut(network, removal)
    layers = tuple(
        PrunedLayer(group.name, group.layers, group.channels, kept[group.name], _share(group, values, kept[group.name]))
        for group in groups
    )
    return PruningReport(layers, left, parameters, sum(parameter.numel() for parameter in network.parameters()))


def pruned(
    network: nn.Module,
    shape: list[int],
    keep: float | dict[str, int] | None = None,
    max_cost: dict[str, float] | None = None,
    model: str = "ideal",
    width: int | str = 8,
    bits: int = 32,
    mode: Mode = "floor",
    importance: Literal["magnitude", "random"] = "magnitude",
    scope: Scope = "layer",
    skip: Sequence[str] = (),
    tokens: bool = False,
) -> nn.Module:
    """``network`` after :func:`prune_channels`, for configurations: the student is then the teacher with less channels.

    Which channels stay follows from the weights, with ``scope="layer"`` not how many. A checkpoint of the student fits
    if the numbers are the same; channels by layer (``report.channels``) are.

    Args:
        network: The network.
        shape: Of a batch, such as ``[1, 1, 40]``; it is filled with random numbers.
        tokens: Whether the batch is token ids.

    The other arguments are those of :func:`prune_channels`.
    """
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    prune_channels(
        network,
        torch.zeros(shape, dtype=torch.long) if tokens else example,
        keep=keep,
        max_cost=max_cost,
        model=model,
        width=width,
        bits=bits,
        mode=mode,
        importance=importance,
        scope=scope,
        skip=skip,
    )
    return network


def _importances(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    importance: str,
    batches: Iterable[Any] | None,
    task: Task | None,
) -> dict[str, Tensor]:
    """Of units, by group."""
    if importance == "taylor":
        if batches is None:
            raise ValueError("`importance='taylor'` needs `batches`: a few batches of training data with labels.")
        found = taylor_importance(network, groups, batches, task or Classification())
    elif importance == "magnitude":
        found = {group.name: magnitude_importance(network, group) for group in groups}
    elif importance == "random":
        generator = torch.Generator().manual_seed(0)
        found = {group.name: torch.rand(group.channels, generator=generator) for group in groups}
    else:
        raise ValueError(f"`importance` must be 'magnitude', 'taylor' or 'random', got {importance!r}.")
    return {
        group.name: found[group.name]
        .new_zeros(max(group.units) + 1)
        .index_add(0, torch.tensor(group.units, device=found[group.name].device), found[group.name])
        for group in groups
    }


def _plan(
    groups: Sequence[ChannelGroup], values: Mapping[str, Tensor], share: float, scope: str, width: int, mode: Mode
) -> dict[str, int]:
    """Channels of each group: never fewer for a larger share."""
    if scope == "layer":
        wanted = {group.name: round(share * group.channels) for group in groups}
    else:
        flat = sorted(
            ((value, group.per_unit, group.name) for group in groups for value in values[group.name].tolist()),
            key=lambda entry: -entry[0],
        )
        wanted = dict.fromkeys((group.name for group in groups), 0)
        for _, size, name in flat[: round(share * len(flat))]:
            wanted[name] += size
    return {
        group.name: min(
            group.channels,
            align_channels(max(1, wanted[group.name]), math.lcm(width, group.per_unit), mode=mode),
        )
        for group in groups
    }


def _named(groups: Sequence[ChannelGroup], left: Mapping[str, str], keep: Mapping[str, int]) -> dict[str, int]:
    owners = {layer: group for group in groups for layer in group.layers}
    channels = {group.name: group.channels for group in groups}
    named: dict[str, tuple[str, int]] = {}
    for name, count in keep.items():
        if name not in owners:
            why = f"its channels stay: {left[name]}" if name in left else f"there are {sorted(owners)}"
            raise ValueError(f"`keep` names {name!r}, which cannot be pruned; {why}.")
        group = owners[name]
        if not 1 <= count <= group.channels or count % group.per_unit:
            unit = f" and a multiple of {group.per_unit}" if group.per_unit > 1 else ""
            raise ValueError(f"`keep[{name!r}]` must be from 1 to {group.channels}{unit}, got {count}.")
        other, before = named.setdefault(group.name, (name, count))
        if before != count:
            raise ValueError(f"`keep` gives {other!r} {before} and {name!r} {count} channels, but they go together.")
        channels[group.name] = count
    return channels


def _cheap_enough(
    network: nn.Module,
    groups: Sequence[ChannelGroup],
    values: Mapping[str, Tensor],
    plan: Callable[[float], dict[str, int]],
    limits: Mapping[str, float],
    estimate: Callable[[nn.Module], Mapping[str, float]],
) -> Mapping[str, int]:
    if not limits or not set(limits) <= set(_COSTS):
        raise ValueError(f"`max_cost` must name some of {list(_COSTS)}, got {list(limits)}.")

    def costs(channels: Mapping[str, int]) -> Mapping[str, float]:
        smaller = copy.deepcopy(network)
        cut(
            smaller,
            together(group.removal(_kept(group, values[group.name], channels[group.name])) for group in groups),
        )
        return estimate(smaller)

    def fits(channels: Mapping[str, int]) -> bool:
        found = costs(channels)
        return all(found[name] <= limit for name, limit in limits.items())

    whole = {group.name: group.channels for group in groups}
    if fits(whole):
        return whole
    steps = max(100, sum(len(value) for value in values.values()))
    if not fits(plan(0.0)):
        least = costs(plan(0.0))
        raise ValueError(
            f"`max_cost` is {dict(limits)}, but the smallest network costs { {name: least[name] for name in limits} }. "
            "Allow more, use a smaller `width`, or skip fewer layers."
        )
    low, high = 0, steps + 1  # plan(low) fits; above high - 1 nothing is tried
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(plan(middle / steps)) else (low, middle)
    return plan(low / steps)


def _estimates(model: CostModel, example: Any, run: Run | None) -> Callable[[nn.Module], Mapping[str, float]]:
    def estimate(network: nn.Module) -> Mapping[str, float]:
        report = model.estimate(network, example, run=run)
        return dict(zip(_COSTS, (report.latency, report.energy, report.size, report.flops), strict=True))

    return estimate


def _kept(group: ChannelGroup, values: Tensor, channels: int) -> tuple[int, ...]:
    """The channels of the most important units, in order; of equal ones the first."""
    best = set(values.sort(descending=True, stable=True).indices[: channels // group.per_unit].tolist())
    return tuple(channel for channel, unit in enumerate(group.units) if unit in best)


def _share(group: ChannelGroup, values: Mapping[str, Tensor], kept: tuple[int, ...]) -> float:
    own = values[group.name]
    units = sorted({group.units[channel] for channel in kept})
    return float(own[units].sum() / own.sum().clamp_min(torch.finfo(own.dtype).tiny))
