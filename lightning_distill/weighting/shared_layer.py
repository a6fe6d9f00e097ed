"""The layer in which the gradients of several terms are compared."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_distill.measuring import measuring


def last_shared_layer(network: nn.Module, losses: Mapping[str, Tensor]) -> str:
    """Name of the last layer of ``network`` whose parameters get a gradient from every loss.

    Layers are submodules with a trainable weight matrix of their own (of two dimensions or more, not shared with
    another submodule; where there is none, any trainable parameter does), in the order of ``named_modules``. It takes
    one backward pass per loss; the graph stays for the backward to come.

    Args:
        network: Where to look.
        losses: Scalars with a graph, by name. Those without one (a term on labels in a batch without) are left out.

    Raises:
        ValueError: If there is no such layer.
    """
    layers = own_parameters(network)
    matrices = {name: [p for p in own if p.ndim > 1] for name, own in layers.items()}
    layers = {name: own for name, own in matrices.items() if own} or layers
    flat = [parameter for own in layers.values() for parameter in own]
    reached: dict[str, set[int]] = {}
    for name, loss in losses.items():
        if flat and loss.requires_grad:
            with measuring():
                gradients = torch.autograd.grad(loss, flat, retain_graph=True, allow_unused=True)
            reached[name] = {id(p) for p, gradient in zip(flat, gradients, strict=True) if gradient is not None}
    shared = [name for name, own in layers.items() if all(any(id(p) in of for p in own) for of in reached.values())]
    if not shared or not reached:
        raise ValueError(
            f"No layer of {type(network).__name__} with trainable parameters gets a gradient from each of the terms "
            f"{list(losses)}, so that their gradients cannot be compared. The last layers that they reach: "
            f"{ {name: _last(layers, of) for name, of in reached.items()} }."
        )
    return shared[-1]


def layer_parameters(network: nn.Module, layer: str) -> list[nn.Parameter]:
    """Trainable parameters of a submodule, those of its own submodules included.

    Args:
        network: Where it is.
        layer: Dotted path.

    Raises:
        ValueError: If there is no such submodule (the message has the nearest names), or nothing in it is trainable.
    """
    modules = dict(network.named_modules())
    if layer not in modules:
        names = [name for name in modules if name]
        near = difflib.get_close_matches(layer, names, n=3, cutoff=0.4) or names[:3]
        raise ValueError(
            f"{type(network).__name__} has no submodule {layer!r}. Nearest names: {', '.join(map(repr, near))}."
        )
    parameters = [p for p in modules[layer].parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            f"The layer {layer!r} has no trainable parameter (it has none at all, or is frozen); choose another one."
        )
    return parameters


def own_parameters(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Trainable parameters of each submodule that stand in it directly and in no other submodule."""
    seen = Counter(id(p) for m in network.modules() for p in m.parameters(recurse=False))
    found = {
        name: [p for p in module.parameters(recurse=False) if p.requires_grad and seen[id(p)] == 1]
        for name, module in network.named_modules()
    }
    return {name: own for name, own in found.items() if own}


def _last(layers: Mapping[str, list[nn.Parameter]], reached: set[int]) -> str | None:
    names = [name for name, own in layers.items() if any(id(p) in reached for p in own)]
    return names[-1] if names else None
