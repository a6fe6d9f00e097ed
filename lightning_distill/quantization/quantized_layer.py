"""What all layers that compute with fake-quantized weights and inputs have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.losses.soft_targets import wide
from lightning_distill.quantization.closed_forms import binary_quantize, ternary_quantize
from lightning_distill.quantization.fake_quantize import (
    SMALLEST_SCALE,
    Grid,
    RowGrid,
    blend,
    fake_quantize,
    grid_of,
    lsq_gradient_scale,
)
from lightning_distill.quantization.scales import affine_scale, minmax_scale, mse_affine_scale, mse_scale
from lightning_distill.quantization.spec import Bits, QuantSpec, mean_bits
from lightning_distill.quantization.surrogate import dsq_fake_quantize

STEPS = ("log_weight_scale", "log_activation_scale", "activation_zero_point", "log_sharpness")
"""What a quantized layer has beside what it had before."""

_SAMPLED = 2**14  # values of an input that are looked at per batch of calibration


class QuantizedLayer(nn.Module):
    """What quantized layers have in common; :func:`~lightning_distill.quantization.prepare` makes them.

    A layer stays the object that it was, with its ``weight`` in floating point, its hooks and its place: only its class
    changes, and it gets ``weight_scale`` (steps, shape ``(channels, groups, 1)``), and where it quantizes its input
    ``activation_scale`` and ``activation_zero_point``. Steps are kept, and trained, as logarithms: one learning rate
    then suits large and small ones, and none can become negative (Jain et al. 2020, TQT,
    https://arxiv.org/abs/1903.08066).

    Attributes:
        spec: How it is quantized. The numbers of bits count as they are in ``bits`` and ``activation_bits``.
        bits: Of the weights: one number, or one for each output channel; 16 and 32 are floating point.
        alpha: How much of the quantization is in force, in [0, 1]; see :func:`~lightning_distill.quantization.blend`.
        enabled: Whether it quantizes; see :func:`~lightning_distill.quantization.full_precision`.
    """

    weight: Tensor
    log_weight_scale: Tensor
    log_activation_scale: Tensor
    activation_zero_point: Tensor
    log_sharpness: nn.Parameter

    spec: QuantSpec
    bits: Bits
    alpha: float
    enabled: bool
    activation_bits: int | None
    plain: type[nn.Module]
    """The class that it was."""
    reads_numbers: bool = True
    """Whether the input is quantizable, as indices are not."""

    def become_quantized(self, spec: QuantSpec) -> None:
        """Add what quantization needs; the class has just changed, and ``spec`` fits."""
        self.spec, self.alpha, self.enabled = spec, 1.0, True
        self.activation_bits = spec.activations if self.reads_numbers else None
        self._take_bits(_of_channels(spec.bits, output_channels(self), ""))
        self._closed_form = spec.weights if isinstance(spec.weights, str) else None
        self._input_known = False
        self._inputs: list[Tensor] | None = None  # what came by, while somebody looks
        self._hold("log_weight_scale", torch.zeros_like(self.rows(wide(self.weight.detach()))[..., :1]))
        if self.needs_range:
            self._hold("log_activation_scale", torch.zeros((), device=self.weight.device))
            self.register_buffer("activation_zero_point", torch.zeros((), device=self.weight.device))
        if spec.gradient == "dsq":
            self.log_sharpness = nn.Parameter(torch.zeros((), device=self.weight.device))
        self.calibrate_weight()

    def become_plain(self) -> None:
        """Be the layer that it was before, with its weights in floating point."""
        for name in STEPS:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        self.__class__ = self.plain  # type: ignore[assignment]

    # The weight.

    @property
    def weight_bits(self) -> int:
        """Bits of a weight; of the widest channel, where they differ."""
        return self.bits if isinstance(self.bits, int) else max(self.bits)

    @property
    def mean_weight_bits(self) -> float:
        """Bits of a weight in the mean over channels."""
        return mean_bits(self.bits)

    def set_bits(self, bits: Bits | Sequence[int], name: str = "the layer") -> None:
        """Give the weights other numbers of bits; their steps are found anew, and no parameter comes or goes.

        Raises:
            ValueError: As :meth:`checked_bits`.
        """
        chosen = self.checked_bits(bits, name)
        if chosen != self.bits:
            self._take_bits(chosen)
            self._closed_form = None
            self.calibrate_weight()

    def checked_bits(self, bits: Bits | Sequence[int], name: str = "the layer") -> Bits:
        """``bits`` as this layer can have them; those of channels that are all the same are one number.

        Raises:
            ValueError: If it has no levels for them, or other channels.
        """
        return _of_channels(self.spec.checked_bits(bits, f"bits of {name}"), output_channels(self), name)

    def rows_of_bits(self) -> list[tuple[int, Tensor]]:
        """Each number of bits, rising, with the numbers of the rows of :meth:`rows` that have it."""
        if isinstance(self.bits, int):
            return [(self.bits, torch.arange(len(self.log_weight_scale), device=self.weight.device))]
        own = torch.tensor(self.bits, device=self.weight.device)
        return [(bits, (own == bits).nonzero().flatten()) for bits in sorted(set(self.bits))]

    def _take_bits(self, bits: Bits) -> None:
        self.bits = bits
        if isinstance(bits, tuple):
            grids = torch.tensor([self._grid_of(own) for own in bits])
            self._channel_grid = RowGrid(*grids.T.reshape(3, -1, 1, 1))

    def _grid_of(self, bits: int) -> Grid:
        even = self.spec.scheme == "seq" or (self.spec.scheme in ("auto", "fixed") and bits <= 2)
        return grid_of(bits, "even" if even else "narrow")

    @property
    def closed_form(self) -> str | None:
        """``"binary"`` or ``"ternary"`` where the levels follow from the weights."""
        return self._closed_form

    @property
    def weight_scale(self) -> Tensor:
        """Steps of the weights, shape ``(channels, groups, 1)``, as they are trained; see :meth:`effective_scale`."""
        return self.log_weight_scale.exp()

    @property
    def activation_scale(self) -> Tensor:
        """Step of the input; a scalar."""
        return self.log_activation_scale.exp()

    @property
    def weight_grid(self) -> Grid | RowGrid:
        """The levels of the weights; 1 to 8 bits."""
        if self._closed_form is not None:
            return grid_of(1, "even") if self._closed_form == "binary" else grid_of(2, "narrow")
        if isinstance(self.bits, int):
            return self._grid_of(self.bits)
        if self._channel_grid.lowest.device != self.weight.device:  # no buffer: those must not come and go
            self._channel_grid = RowGrid(*(part.to(self.weight.device) for part in self._channel_grid))
        return self._channel_grid

    def calibrate_weight(self) -> None:
        """Set the steps of the weights to those of the least squared error."""
        with torch.no_grad():
            if (scale := self._present_scale()) is None:
                scale = mse_scale(self.rows(self.weight), self.weight_grid) if self.weight_bits <= 8 else None
            if scale is not None:
                self.log_weight_scale.copy_(scale.clamp_min(SMALLEST_SCALE).log())

    def quantized_weight(self) -> Tensor:
        """The weights rounded to their levels, in their shape and dtype; differentiable."""
        return self.from_rows(self._quantized_rows(self.rows(self.weight), self.weight_scale))

    def effective_scale(self) -> Tensor:
        """The steps that :meth:`quantized_weight` uses now, shape ``(channels, groups, 1)``."""
        with torch.no_grad():
            scale = self._present_scale()
            return (self.weight_scale if scale is None else scale).detach().clone()

    def _present_scale(self) -> Tensor | None:
        """The steps, where they follow from the weights."""
        rows = self.rows(wide(self.weight))
        if self._closed_form is not None:  # two levels at half a step are one step apart
            return 2 * binary_quantize(rows)[1] if self._closed_form == "binary" else ternary_quantize(rows)[1]
        if self.spec.scheme == "minmax" and self.weight_bits <= 8:
            return minmax_scale(rows, self.weight_grid)
        return None

    def _quantized_rows(self, rows: Tensor, scale: Tensor, numbers: Tensor | None = None) -> Tensor:
        """``rows``, all or those of these numbers, rounded to their levels."""
        bits = self.weight_bits
        if bits > 8:
            halves = rows if bits == 32 else rows + (rows.half().to(rows.dtype) - rows).detach()
            return unused(halves, self._learned())
        if self._closed_form is not None:
            form = binary_quantize if self._closed_form == "binary" else ternary_quantize
            return unused(form(rows)[0], self._learned())
        grid = self.weight_grid
        if isinstance(grid, RowGrid) and numbers is not None:
            grid = grid.of(numbers)
        if self.spec.scheme == "minmax":
            scale = minmax_scale(rows.detach(), grid)
        if self.spec.gradient == "dsq":
            return dsq_fake_quantize(rows, scale, 2.5 * self.log_sharpness.exp(), grid=grid)
        per_step = self.weight.numel() / self.log_weight_scale.numel()
        return fake_quantize(rows, scale, grid=grid, scale_gradient=lsq_gradient_scale(per_step, grid))

    def _weight_in_force(self) -> Tensor:
        if not self.enabled:
            return self.weight
        if self.alpha == 0:
            return unused(self.weight, self._learned())
        return blend(self.weight, self.quantized_weight(), self.alpha)

    def rows(self, weight: Tensor) -> Tensor:
        """``weight`` as ``(channels, groups, weights)``; each group has one step."""
        first = self.channels_first(weight)
        if self.spec.granularity == "tensor":
            return first.reshape(1, 1, -1)
        return first.reshape(len(first), -1, self.spec.group_size or math.prod(first.shape[1:]))

    def from_rows(self, rows: Tensor) -> Tensor:
        """What :meth:`rows` has made of a weight, in the layer's own shape again."""
        return rows.reshape(self.weight.shape)

    def channels_first(self, weight: Tensor) -> Tensor:
        """``weight`` with its output channels as the first dimension."""
        return weight

    # The input.

    @property
    def needs_range(self) -> bool:
        """Whether the input has one range, which calibration finds."""
        return self.activation_bits is not None and self.spec.activation_range == "layer"

    @property
    def is_calibrated(self) -> bool:
        """Whether the range of the input is known, or not needed."""
        return not self.needs_range or self._input_known

    def input_levels(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point with which ``values`` are quantized: scalars, or one of each vector, shape ``(..., 1)``.

        Raises:
            RuntimeError: If their range is not known.
        """
        assert self.activation_bits is not None
        if not self.needs_range:
            seen = wide(values.detach())
            least, largest = seen.amin(dim=-1, keepdim=True), seen.amax(dim=-1, keepdim=True)
            return affine_scale(least, largest, self.activation_bits)
        if not self._input_known:
            raise RuntimeError(
                "A quantized layer reads values whose range is not known. Call `calibrate(model, batches)` before."
            )
        return self.activation_scale, self.activation_zero_point

    def quantized_input(self, values: Tensor) -> Tensor:
        """``values`` rounded to the levels of the layer's input.

        Raises:
            RuntimeError: If their range is not known.
        """
        if self.activation_bits is None:
            return values
        scale, zero = self.input_levels(values)
        grid = grid_of(self.activation_bits, "unsigned")
        per_sample = values[0].numel() if values.ndim > 0 and len(values) > 0 else 1
        per_step = lsq_gradient_scale(max(per_sample, 1), grid)
        return fake_quantize(values, scale, grid=grid, zero_point=zero, scale_gradient=per_step)

    def _input_in_force(self, values: Tensor) -> Tensor:
        if self._inputs is not None:
            self._inputs.append(_sample(values))
        if self.activation_bits is None or not self.enabled or self._inputs is not None:
            return values
        if self.alpha == 0:
            return unused(values, [self.log_activation_scale] if self.spec.learns and self.needs_range else [])
        return blend(values, self.quantized_input(values), self.alpha)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Within this context the input is left alone and looked at; at its end its range is set."""
        seen: list[Tensor] = []
        self._inputs = seen
        try:
            yield
        finally:
            self._inputs = None
        if self.needs_range and seen:
            self._set_input_range(torch.cat(seen))

    def _set_input_range(self, values: Tensor) -> None:
        assert self.activation_bits is not None
        if self.spec.scheme == "minmax":
            scale, zero = affine_scale(float(values.min()), float(values.max()), self.activation_bits)
        else:
            scale, zero = mse_affine_scale(values, self.activation_bits)
        with torch.no_grad():
            self.log_activation_scale.copy_(scale.log())
            self.activation_zero_point.copy_(zero)
        self._input_known = True

    # Both.

    def get_extra_state(self) -> Tensor:
        """Bits of weights and input, whether the input's range is known, and bits of channels that differ."""
        channels = self.bits if isinstance(self.bits, tuple) else ()
        return torch.tensor([self.weight_bits, self.activation_bits or 0, int(self._input_known), *channels])

    def set_extra_state(self, state: Tensor) -> None:
        """Take over bits from a checkpoint; the steps come with its tensors."""
        bits, activations, known, *channels = state.tolist()
        if (found := tuple(channels) or bits) != self.bits:
            self._take_bits(found)
            self._closed_form = None
        self.activation_bits, self._input_known = activations or None, bool(known)

    def extra_repr(self) -> str:
        """The numbers of bits."""
        form = self._closed_form or f"{self.mean_weight_bits:g}"
        return f"{super().extra_repr()}, weights={form}, activations={self.activation_bits}"

    def _hold(self, name: str, value: Tensor) -> None:
        if self.spec.learns:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def _learned(self) -> list[Tensor]:
        """What is trained beside the weight, for formats that do not use it."""
        return [p for name, p in self.named_parameters(recurse=False) if name in ("log_weight_scale", "log_sharpness")]


def output_channels(layer: nn.Module) -> int:
    """How many output channels a linear layer or a convolution has, or rows a table."""
    names = ("out_features", "out_channels", "num_embeddings")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def check_fit(layer: nn.Module, spec: QuantSpec, name: str) -> None:
    """Refuse a spec that a layer cannot have.

    Raises:
        ValueError: If its groups do not divide a channel, it has bits for other channels, or it gives tokens ranges of
            their own and the layer is a convolution.
    """
    weight: Any = layer.weight
    channels = output_channels(layer)
    per_channel = weight.numel() // channels
    if spec.group_size is not None and per_channel % spec.group_size:
        raise ValueError(
            f"`granularity` is {spec.granularity!r}, but {name!r} has {per_channel} weights per channel, which "
            f"groups of {spec.group_size} do not divide. Give it another one: "
            f"`overrides={{{name!r}: QuantSpec(granularity='channel')}}`."
        )
    if spec.activation_range == "token" and not isinstance(layer, (nn.Linear, nn.Embedding)):
        raise ValueError(
            f"`activation_range` is 'token', but {name!r} is a {type(layer).__name__}, which reads no vectors. Give it "
            f"another spec, `overrides={{{name!r}: QuantSpec(...)}}`, or leave it out: `skip=[{name!r}]`."
        )
    _of_channels(spec.bits, channels, name)


def _of_channels(bits: Bits, channels: int, name: str) -> Bits:
    """``bits`` of so many channels; one number where they are all the same."""
    if isinstance(bits, tuple) and len(bits) != channels:
        raise ValueError(f"{name!r} has {channels} output channels, but there are bits for {len(bits)}.")
    return bits[0] if isinstance(bits, tuple) and len(set(bits)) == 1 else bits


def unused(values: Tensor, parameters: list[Any]) -> Tensor:
    """``values``, with a graph to ``parameters`` that were not needed: DDP waits for every parameter's gradient."""
    for parameter in parameters:
        values = values + 0 * parameter.sum()
    return values


def _sample(values: Tensor) -> Tensor:
    """Some of ``values``, among them the smallest and the largest."""
    flat = values.detach().flatten()
    stride = max(flat.numel() // _SAMPLED, 1) | 1  # odd: channels are often a power of two
    return torch.cat([flat[::stride], flat.amin()[None], flat.amax()[None]]).float()
