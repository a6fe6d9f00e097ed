"""Named activations out of any network, by forward hooks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Taps:
    """Keeps the outputs of chosen submodules while a network runs.

    The hooks exist from construction to :meth:`remove`; with no names there are none, and nothing is paid.

    Args:
        network: Any module; it is not changed.
        names: Dotted paths of submodules, as in ``network.get_submodule``.

    Raises:
        ValueError: If the network has no submodule of a name; the message lists the nearest names.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> taps = Taps(network, ["1"])
        >>> _ = network(torch.ones(5, 2))
        >>> {name: tuple(feature.shape) for name, feature in taps.take().items()}
        {'1': (5, 3)}
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._kept: dict[str, Tensor] = {}
        modules = dict(network.named_modules())
        unknown = [name for name in self.names if name not in modules or name == ""]
        if unknown:
            raise ValueError(_unknown_name(unknown[0], [name for name in modules if name], type(network).__name__))
        self._handles: list[RemovableHandle] = [self._hook(modules[name], name) for name in self.names]

    def _hook(self, module: nn.Module, name: str) -> RemovableHandle:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self._kept[name] = _first_tensor(output, name)

        return module.register_forward_hook(keep)

    def take(self) -> dict[str, Tensor]:
        """The activations of the last forward pass by name; afterwards none are kept."""
        kept, self._kept = self._kept, {}
        return kept

    def remove(self) -> None:
        """Take the hooks out of the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._kept = {}


def _first_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(
        f"The submodule {name!r} returned {type(output).__name__}; a tap needs a tensor, or a tuple of them."
    )


def _unknown_name(name: str, known: list[str], network: str) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    return (
        f"{network} has no submodule {name!r}. Nearest names: {', '.join(map(repr, near)) or '(it has no submodules)'}."
    )
