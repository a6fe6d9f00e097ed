"""The weights of layers that are quantized already, at several numbers of bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lightning_distill.bit_search.allocate import weight_bits
from lightning_distill.bit_search.rounding import check_bits, chosen_layers, of_channels
from lightning_distill.quantization import QuantizedLayer, full_precision, quantized_layers
from lightning_distill.quantization.quantized_layer import STEPS
from lightning_distill.quantization.spec import Bits

WEIGHT_STEPS = "log_weight_scale"


class QuantizedWeights:
    """As :class:`~lightning_distill.bit_search.RoundedWeights`, for a network that ``prepare`` has quantized.

    A layer has its own quantizer and, at its present number of bits, its trained steps; at others those of the least
    squared error. Inputs are quantized as they are in the network. What is not searched keeps its bits.

    Args:
        network: Not changed outside :meth:`applied`.
        bits: Numbers of bits to choose from.
        layers: Names of the layers; by default all quantized ones.

    Raises:
        ValueError: If there is no such layer, one is binary or ternary, or a number of bits has no quantizer.
    """

    def __init__(self, network: nn.Module, bits: Sequence[int], layers: Sequence[str] | None = None) -> None:
        check_bits(bits)
        self.bits = tuple(sorted(set(bits)))
        self._network = network
        self._layers = chosen_layers(network, quantized_layers(network), layers, "quantized layer")
        self._steps: dict[tuple[str, int], dict[str, Tensor]] = {}
        for name, layer in self._layers.items():
            if layer.closed_form is not None:
                raise ValueError(
                    f"The layer {name!r} is {layer.closed_form} and has no bits to choose. Leave it out: "
                    f"`layers={[other for other in self._layers if other != name]}`."
                )
            state, own, now = layer.get_extra_state(), _steps(layer), layer.bits
            try:
                for choice in self.bits:
                    layer.set_bits(choice)
                    self._steps[name, choice] = own if choice == now else _steps(layer)
            finally:
                layer.set_extra_state(state)
                _put(layer, own)

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each layer's weight."""
        return {name: layer.weight.numel() for name, layer in self._layers.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The layers' own weights."""
        return {name: cast(nn.Parameter, layer.weight) for name, layer in self._layers.items()}

    @property
    def costs(self) -> dict[str, dict[int, float]]:
        """Bits of storage of each layer at each number of bits."""
        return weight_bits(self.sizes, self.bits)

    def rows(self, name: str, weight: Tensor) -> Tensor:
        """A tensor of the shape of a layer's weight as a matrix with a row for each output channel."""
        first = self._layers[name].channels_first(weight)
        return first.reshape(len(first), -1)

    def changes(self, name: str) -> Tensor:
        """What rounding does to a layer's weight: shape ``(numbers of bits, channels, weights of a channel)``."""
        layer, found = self._layers[name], []
        own = self.rows(name, layer.weight.detach())
        for choice in self.bits:
            with torch.no_grad(), self.applied({name: choice}):
                found.append(self.rows(name, layer.quantized_weight()) - own)
        return torch.stack(found)

    def original(self) -> AbstractContextManager[None]:
        """Within this context the network computes in full precision."""
        return full_precision(self._network)

    @contextmanager
    def applied(self, plan: Mapping[str, Bits]) -> Iterator[None]:
        """Within this context the network has the bits of ``plan``, in full force; afterwards all is as it was."""
        layers = quantized_layers(self._network).values()
        shares = [layer.alpha for layer in layers]
        own = {name: (layer.get_extra_state(), _steps(layer)) for name, layer in self._layers.items() if name in plan}
        try:
            for layer in layers:
                layer.alpha = 1.0
            for name, bits in plan.items():
                self._layers[name].set_extra_state(_state_with(own[name][0], bits))
                _put(self._layers[name], self._steps_of(name, bits))
            yield
        finally:
            for name, (state, steps) in own.items():
                self._layers[name].set_extra_state(state)
                _put(self._layers[name], steps)
            for layer, share in zip(layers, shares, strict=True):
                layer.alpha = share

    def _steps_of(self, name: str, bits: Bits) -> dict[str, Tensor]:
        choices = {choice: self._steps[name, choice][WEIGHT_STEPS] for choice in self.bits}
        return self._steps[name, self.bits[0]] | {WEIGHT_STEPS: of_channels(bits, choices)}


def _state_with(state: Tensor, bits: Bits) -> Tensor:
    """A layer's state with other bits of its weights."""
    channels = () if isinstance(bits, int) else bits
    return torch.tensor([max(channels, default=bits), *state[1:3].tolist(), *channels])


def _steps(layer: QuantizedLayer) -> dict[str, Tensor]:
    return {name: getattr(layer, name).detach().clone() for name in STEPS if hasattr(layer, name)}


@torch.no_grad()
def _put(layer: QuantizedLayer, steps: dict[str, Tensor]) -> None:
    for name, value in steps.items():
        getattr(layer, name).copy_(value)


__all__ = ["QuantizedWeights"]
