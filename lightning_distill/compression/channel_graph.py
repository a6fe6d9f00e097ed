"""Which channels of a network go together: read off its autograd graph, and tried out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_distill.compression.channels import (
    ChannelGroup,
    Removal,
    Side,
    Slice,
    axes,
    cut,
    is_depthwise,
    mask,
    norm_groups,
)
from lightning_distill.modes import inference, run_batch

Run = Callable[[nn.Module, Any], Any]
_TOLERANCE = 1e-4
_LONGEST = 4  # steps of a search, per edge of the graph; those that end take about one


def channel_groups(
    network: nn.Module, example: Any, *, run: Run | None = None, skip: Sequence[str] = ()
) -> tuple[tuple[ChannelGroup, ...], dict[str, str]]:
    """Groups of channels that can be removed, and why the channels of the other layers cannot.

    torch-pruning (Fang et al. 2023, DepGraph) finds candidates in the autograd graph of one pass, from the kinds of
    operations; it cannot know what each operation does. So every group is tried out on a copy with random weights:
    without half of its channels it must say what the whole network says when nobody reads them. What fails stays.
    So do layers whose search is stopped because it has taken far more steps than the graph has edges.

    Args:
        network: Any network; it is not changed.
        example: A batch that uses all layers.
        run: Lets the network read it. Default: ``network(batch)``, of a tuple only the first one, or
            ``network(**batch)`` of a mapping.
        skip: Names or patterns of layers whose channels stay; also of layers that the example does not use.

    Raises:
        ModuleNotFoundError: If torch-pruning is missing.
        ValueError: If a pattern fits nothing, the network cannot read the example, or does not use a layer for it.
    """
    probe = _random_copy(network, example, run)
    makers = {name for name, layer in probe.named_modules() if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))}
    for pattern in skip:
        if not any(fnmatchcase(name, pattern) for name in makers):
            raise ValueError(f"`skip` has {pattern!r}, which fits no layer; there are {sorted(makers)}.")
    skipped = {name for name in makers if any(fnmatchcase(name, pattern) for pattern in skip)}
    _check_used(probe, makers - skipped, example, run)
    found: list[ChannelGroup] = []
    left: dict[str, str] = {}
    reason: str | None
    for layers, channels, slices in _candidates(probe, skipped, example, run):
        if skipped & set(layers):
            reason = "skipped"
        elif channels == 1:
            reason = "a single channel"
        elif isinstance(slices, str):
            reason = slices
        elif (reason := _shared(probe, slices)) is None:
            reason = "they cannot be parted evenly"
            for units in _units(probe, layers[0], channels, slices):
                group = ChannelGroup(layers[0], layers, channels, units, slices)
                half = group.removal(channel for channel, unit in enumerate(units) if unit % 2)
                if (reason := fault(probe, half, example, run)) is None:
                    found.append(group)
                    break
        if reason is not None:
            left.update(dict.fromkeys(layers, reason))
    makers_found = {name for group in found for name in group.layers}
    return tuple(found), {name: reason for name, reason in left.items() if name not in makers_found}


def check_removal(network: nn.Module, removal: Removal, example: Any, *, run: Run | None = None) -> None:
    """Try a whole removal out.

    Raises:
        ValueError: If the network without the channels is not the one that does not read them.
    """
    if not any(removal.values()):
        return
    if reason := fault(_random_copy(network, example, run), removal, example, run):
        raise ValueError(f"{type(network).__name__} cannot be pruned like that: {reason}. `skip` some of the layers.")


def fault(probe: nn.Module, removal: Removal, example: Any, run: Run | None) -> str | None:
    """What goes wrong without some channels, in words; ``None`` if nothing does."""
    whole = _said(probe, example, run)
    masked, smaller = copy.deepcopy(probe), copy.deepcopy(probe)
    try:
        mask(masked, removal)
        cut(smaller, removal)
        found = _said(smaller, example, run)
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        return f"it cannot run without them ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__})"
    expected = _said(masked, example, run)
    if [value.shape for value in found] != [value.shape for value in expected]:
        return "they are outputs of the network"
    if _close(expected, whole):
        return "no layer reads them"
    return (
        None if _close(found, expected) else "what they do cannot be taken apart (attention, or a norm over channels)"
    )


def _close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        bool((one - other).abs().max() <= _TOLERANCE * other.abs().max().clamp_min(1e-30))
        for one, other in zip(found, expected, strict=True)
        if other.numel()
    )


def _said(network: nn.Module, example: Any, run: Run | None) -> list[Tensor]:
    with inference(network):
        said = _flat((run or run_batch)(network, example))
    return [value for value in said if value.is_floating_point()]


def _flat(said: Any) -> list[Tensor]:
    parts = list(said.values()) if isinstance(said, Mapping) else said
    return [value for value in tree_leaves(parts) if isinstance(value, Tensor)]


def _random_copy(network: nn.Module, example: Any, run: Run | None) -> nn.Module:
    """A copy with random weights, none of them zero: an untrained last layer would hide every mistake."""
    plain = copy.deepcopy(network).float().requires_grad_(False)
    try:
        _said(plain, example, run)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot read `example`: {error} Give a batch as in training, or `run`."
        ) from error
    probe = copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        random = torch.empty(parameter.shape)
        if parameter.ndim > 1:
            random.normal_(std=math.sqrt(1 / max(1, parameter[0].numel())), generator=generator)
        else:
            random.uniform_(0.5, 1.5, generator=generator)
        parameter.copy_(random)
    return probe if all(bool(value.isfinite().all()) for value in _said(probe, example, run)) else plain


def _check_used(probe: nn.Module, makers: set[str], example: Any, run: Run | None) -> None:
    used: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda *_: used.add(name)

    handles = [probe.get_submodule(name).register_forward_hook(note(name)) for name in makers]
    try:
        _said(probe, example, run)
    finally:
        for handle in handles:
            handle.remove()
    if unused := sorted(makers - used):
        raise ValueError(
            f"`example` does not use the layers {unused}, so what they read is unknown. Give one that uses them; if "
            f"they are never used, or by other inputs only and read nothing that is pruned: `skip={unused}`."
        )


def _candidates(
    probe: nn.Module, skipped: set[str], example: Any, run: Run | None
) -> list[tuple[tuple[str, ...], int, tuple[Slice, ...] | str]]:
    """Layers that make the same channels, how many, and where these lie, or why that is unknown."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pruning channels needs torch-pruning: `pip install lightning-distill[pruning]`."
        ) from error
    traced = copy.deepcopy(probe).eval().requires_grad_(True)

    def forward(model: nn.Module, batch: Any) -> list[Tensor]:
        return [value for value in _flat((run or run_batch)(model, batch)) if value.grad_fn is not None]

    graph = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(traced, example, forward_fn=forward, verbose=False)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"The graph of {type(probe).__name__} cannot be read: {error!r}. Give `run`, which returns logits with a "
            "gradient, or prune the part of the network that can be traced."
        ) from error
    names = {layer: name for name, layer in traced.named_modules()}
    visits = _Visits(_LONGEST * sum(len(node.dependencies) for node in graph.module2node.values()))
    for node in graph.module2node.values():
        node.dependencies = _Counted(node.dependencies, visits)
    found: list[tuple[tuple[str, ...], int, tuple[Slice, ...] | str]] = []
    seen: set[str] = set()
    for layer in list(graph.module2node):
        name = names.get(layer)
        if name is None or name in seen or not isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            continue
        if type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and is_depthwise(layer):
            continue  # it makes no channels: it passes them on
        if name in skipped:
            found.append(((name,), 0, "skipped"))
            continue
        pruner = graph.get_pruner_of_module(layer)
        channels = pruner.get_out_channels(layer)
        visits.left = visits.most
        try:
            group = graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(channels)))
        except _EndlessError:
            found.append(((name,), channels, "torch-pruning finds no end to what hangs together with them"))
            continue
        slices, makers = _slices(group, names)
        seen.update(makers)
        found.append((tuple(makers), channels, slices or "layers of another kind, or bare parameters, share them"))
    return found


class _EndlessError(Exception):
    """The search of one group has taken too many steps."""


class _Visits:
    """How many steps a search has left; torch-pruning's own has no bound, and in Llama's attention no end."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most


class _Counted(list[Any]):
    """The dependencies of a node, which the search reads once per step."""

    def __init__(self, dependencies: list[Any], visits: _Visits) -> None:
        super().__init__(dependencies)
        self._visits = visits

    def __iter__(self) -> Iterator[Any]:
        self._visits.left -= 1
        if self._visits.left < 0:
            raise _EndlessError
        return super().__iter__()


def _slices(group: Any, names: Mapping[nn.Module, str]) -> tuple[tuple[Slice, ...] | None, list[str]]:
    slices: list[Slice] = []
    makers: list[str] = []
    known = True
    for item in group.items:
        layer = item.dep.target.module
        if isinstance(layer, nn.Parameter):
            known = False  # a parameter of the network itself: which of its axes are channels, nobody knows
            continue
        if layer not in names:
            continue  # an operation
        side: Side = "in" if item.dep.handler.__name__ == "prune_in_channels" else "out"
        if axes(layer, "both") is not None:
            side = "both"
        elif side == "out" and isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            makers.append(names[layer])
        if axes(layer, side) is None:
            if any(True for _ in layer.parameters()):
                known = False
            continue
        if any(channel is None for channel in item.root_idxs):
            known = False
            continue
        pairs = sorted(zip(item.idxs, item.root_idxs, strict=True))
        slices.append(Slice(names[layer], side, tuple(p for p, _ in pairs), tuple(c for _, c in pairs)))
    return (tuple(slices) if known else None), makers


def _shared(probe: nn.Module, slices: tuple[Slice, ...]) -> str | None:
    users: dict[int, int] = {}
    for module in probe.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for part in slices:
        layer = probe.get_submodule(part.name)
        if any(users[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            return f"{part.name!r} shares its weights with another layer"
    return None


def _units(probe: nn.Module, name: str, channels: int, slices: tuple[Slice, ...]) -> list[tuple[int, ...]]:
    """Ways to see channels as units: first one by one (or across groups), then as heads of attention."""
    groups = math.lcm(*(norm_groups(probe.get_submodule(part.name)) for part in slices))
    ways = []
    if channels % groups == 0 and channels // groups > 1:
        ways.append(tuple(channel % (channels // groups) for channel in range(channels)))
    size = getattr(probe.get_submodule(name.rpartition(".")[0]), "head_dim", None)
    if groups == 1 and isinstance(size, int) and size > 1 and channels % size == 0 and channels > size:
        ways.append(tuple(channel // size for channel in range(channels)))
    return ways


__all__ = ["channel_groups", "check_removal", "fault"]
