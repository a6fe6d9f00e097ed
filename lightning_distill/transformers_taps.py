"""Hidden states and attention maps of transformers models, by the names that transformers gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

NAME = re.compile(r"((?:encoder_|decoder_)?hidden_states|(?:encoder_|decoder_|cross_)?attentions)\.(-?\d+)")
EAGER = "eager"


def is_model_tap(network: nn.Module, name: str) -> bool:
    """Whether ``name`` is such a name and ``network`` a transformers model (or a PEFT model over one)."""
    return NAME.fullmatch(name) is not None and hasattr(network, "config") and hasattr(network, "base_model")


class ModelTaps:
    """Has a transformers model return hidden states and attention maps, and hands chosen ones over.

    Args:
        network: A transformers model.
        names: As ``"hidden_states.3"``, ``"attentions.-1"``, ``"decoder_attentions.0"``.
        keep: Is called with each name and tensor in every forward pass.

    Raises:
        ValueError: If the model cannot be switched to an attention that returns its maps; in the first pass, if it has
            no layer of a number.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], keep: Callable[[str, Tensor], None]) -> None:
        self._model = _base_model(network)
        self._wanted = {name: _parsed(name) for name in names}
        self._keep = keep
        self._attention = any("attentions" in kind for kind, _ in self._wanted.values())
        self._implementation = _switch_attention(self._model, EAGER) if self._attention else None
        self._handles = [
            self._model.register_forward_pre_hook(self._ask, with_kwargs=True),
            self._model.register_forward_hook(self._hand_over),
        ]

    def remove(self) -> None:
        """Take the hooks out, and give the model its own attention back."""
        for handle in self._handles:
            handle.remove()
        if self._implementation is not None:
            _switch_attention(self._model, self._implementation)

    def _ask(self, model: nn.Module, inputs: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wanted = {"return_dict": True}
        if any("hidden_states" in kind for kind, _ in self._wanted.values()):
            wanted["output_hidden_states"] = True
        if self._attention:
            wanted["output_attentions"] = True
        return inputs, {**keywords, **wanted}

    def _hand_over(self, model: nn.Module, inputs: Any, output: Any) -> None:
        for name, (kind, layer) in self._wanted.items():
            values = getattr(output, kind, None) or ()
            if not -len(values) <= layer < len(values):
                what = f"{len(values)} of them" if values else f"no {kind}: it returns {', '.join(output)}"
                raise ValueError(f"The tap {name!r} is not there: {type(model).__name__} returned {what}.")
            value = values[layer]
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"The tap {name!r} is empty: the attention of {type(model).__name__} does not return its maps. "
                    f"Load the model with `attn_implementation={EAGER!r}`."
                )
            self._keep(name, value)


def _base_model(network: Any) -> Any:
    """The part of a transformers model under its head, which is run with and without the head."""
    network = network.get_base_model() if hasattr(network, "get_base_model") else network
    return network.base_model


def _parsed(name: str) -> tuple[str, int]:
    match = NAME.fullmatch(name)
    assert match is not None
    return match[1], int(match[2])


def _switch_attention(model: Any, implementation: str) -> str | None:
    """Switch ``model``; returns the implementation that it had, ``None`` if nothing had to be done."""
    before: str | None = getattr(model.config, "_attn_implementation", None)
    if before in (None, implementation):
        return None
    if not hasattr(model, "set_attn_implementation"):  # older transformers choose their classes at loading
        raise ValueError(
            f"Attention maps are asked for, which {type(model).__name__} with `attn_implementation={before!r}` does "
            f"not return. Load the model with `attn_implementation={EAGER!r}`."
        )
    model.set_attn_implementation(implementation)
    return before
