"""Named activations out of any network, by forward hooks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_distill.transformers_taps import ModelTaps, is_model_tap

INPUT = "@input"
"""Ending of a name that means the input of a submodule instead of its output."""


class Taps:
    """Keeps chosen activations while a network runs.

    A name is the dotted path of a submodule, as in ``network.get_submodule``, and means its output; ``"norm@input"``
    means its (first) input, such as the features before a norm. Of transformers models ``"hidden_states.3"`` and
    ``"attentions.3"`` are known too, counted as transformers does: hidden state 0 is the embedding, ``-1`` the last.
    For attention maps the model is switched to an attention that computes them (``eager``) until :meth:`remove`.

    The hooks exist from construction to :meth:`remove`; with no names there are none, and nothing is paid. Nothing is
    kept outside :meth:`recording`: not by a pass of somebody else, nor by one that activation checkpointing repeats.

    Args:
        network: Any module; its code is not changed.
        names: What to keep.

    Raises:
        ValueError: If the network has no submodule of a name; the message lists the nearest names.

    Example:
        >>> import torch
        >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> taps = Taps(network, ["1", "2@input"])
        >>> with taps.recording() as features:
        ...     _ = network(torch.ones(5, 2))
        >>> {name: tuple(feature.shape) for name, feature in features.items()}
        {'1': (5, 3), '2@input': (5, 3)}
    """

    def __init__(self, network: nn.Module, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._kept: dict[str, Tensor] | None = None
        self._handles: list[RemovableHandle] = []
        self._model_taps: ModelTaps | None = None
        if not self.names:
            return
        modules = {name: module for name, module in network.named_modules() if name}
        of_model = [name for name in self.names if name not in modules and is_model_tap(network, name)]
        paths = {name: name.removesuffix(INPUT) for name in self.names if name not in of_model}
        if unknown := [path for path in paths.values() if path not in modules]:
            raise ValueError(_unknown_name(unknown[0], list(modules), type(network).__name__))
        for name, path in paths.items():
            self._handles.append(self._hook(modules[path], name))
        if of_model:
            self._model_taps = ModelTaps(network, of_model, self._keep)

    def recording(self) -> AbstractContextManager[dict[str, Tensor]]:
        """Within this context the activations of the last forward pass come into the dictionary, by name."""
        return self._recording() if self.names else nullcontext({})

    @contextmanager
    def _recording(self) -> Iterator[dict[str, Tensor]]:
        kept: dict[str, Tensor] = {}
        self._kept = kept
        try:
            yield kept
        finally:
            self._kept = None

    def remove(self) -> None:
        """Take the hooks out of the network."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._model_taps is not None:
            self._model_taps.remove()
            self._model_taps = None

    def _keep(self, name: str, value: Tensor) -> None:
        if self._kept is not None:
            self._kept[name] = value

    def _hook(self, module: nn.Module, name: str) -> RemovableHandle:
        if name.endswith(INPUT):

            def keep_input(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
                if self._kept is not None:
                    self._keep(name, _first_tensor(inputs or tuple(keywords.values()), name))

            return module.register_forward_pre_hook(keep_input, with_kwargs=True)

        def keep_output(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._kept is not None:
                self._keep(name, _first_tensor(output, name))

        return module.register_forward_hook(keep_output)


def _first_tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    raise TypeError(
        f"The tap {name!r} found {type(value).__name__}; it needs a tensor, or a tuple that begins with one."
    )


def _unknown_name(name: str, known: list[str], network: str) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
    return (
        f"{network} has no submodule {name!r}. Nearest names: {', '.join(map(repr, near)) or '(it has no submodules)'}."
    )
