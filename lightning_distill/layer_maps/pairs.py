"""Pairs of taps from two networks and the name of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from lightning_distill.layer_maps.choices import all_map, last_map, uniform_map
from lightning_distill.layer_maps.layer_map import LayerMap
from lightning_distill.layer_maps.shorten import find_stack

MapName = Literal["uniform", "last", "all"]
MAPS: dict[str, Callable[[int, int], LayerMap]] = {"uniform": uniform_map, "last": last_map, "all": all_map}


def named_pairs(student: nn.Module, teacher: nn.Module, name: MapName) -> dict[str, str]:
    """Pairs of layers as feature terms take them, by a rule that needs nothing but the depths.

    Layers of transformers models are their ``hidden_states``; of others the entries of the list of layers that
    :func:`find_stack` finds.

    Args:
        student: The network that learns.
        teacher: The network that teaches.
        name: ``"uniform"``: evenly spaced layers of the teacher; ``"last"``: the last layers alone; ``"all"``: each
            layer with its counterpart.

    Raises:
        ValueError: If ``name`` is unknown, no list of layers is found, or the depths do not fit.

    Example:
        >>> layers = [nn.Sequential(*(nn.Linear(4, 4) for _ in range(depth))) for depth in (2, 6)]
        >>> named_pairs(*(nn.ModuleDict({"blocks": blocks}) for blocks in layers), "uniform")
        {'blocks.0': 'blocks.2', 'blocks.1': 'blocks.5'}
    """
    if name not in MAPS:
        raise ValueError(f"`pairs` must map taps to taps or be one of {', '.join(MAPS)}, got {name!r}.")
    (ours, our_depth), (theirs, their_depth) = _layers(student), _layers(teacher)
    return MAPS[name](our_depth, their_depth).pairs(ours, theirs)


def _layers(network: nn.Module) -> tuple[str, int]:
    """Template of the taps of the layers, and how many there are."""
    config: Any = getattr(network, "config", None)
    if isinstance(depth := getattr(config, "num_hidden_layers", None), int):
        return "hidden_states.{}", depth
    stack = find_stack(network)
    layers: Any = network.get_submodule(stack)
    return f"{stack}.{{}}", len(layers)
