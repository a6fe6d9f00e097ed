"""Rounding to a few levels, with gradients."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import wide

SMALLEST_SCALE = 1e-8
"""Steps are kept at least this large, so that a learned one never reaches 0."""


class Grid(NamedTuple):
    """Levels of a quantizer: ``(code - zero_point) * scale`` with whole numbers ``lowest <= code <= highest``."""

    lowest: int
    highest: int
    zero_point: float = 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude of a level, in steps."""
        return max(self.highest - self.zero_point, self.zero_point - self.lowest)

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a level."""
        return float(self.zero_point).is_integer()


class RowGrid(NamedTuple):
    """Levels as of a :class:`Grid`, others in each row: tensors that broadcast against the values."""

    lowest: Tensor
    highest: Tensor
    zero_point: Tensor

    @property
    def largest(self) -> Tensor:
        """The largest magnitude of a level in each row, in steps."""
        return torch.maximum(self.highest - self.zero_point, self.zero_point - self.lowest)

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a level of each row."""
        return bool((self.zero_point == self.zero_point.round()).all())

    def of(self, rows: Tensor) -> RowGrid:
        """The levels of some rows, by their numbers."""
        return RowGrid(*(part[rows] for part in self))


def grid_of(bits: int, levels: Literal["narrow", "full", "even", "unsigned"] = "narrow") -> Grid:
    """The levels that ``bits`` bits can name.

    Args:
        bits: 1 to 16; ``"narrow"`` needs 2.
        levels: ``"narrow"`` leaves one code out and is symmetric with a level at 0 (-7 … 7 with 4 bits); ``"full"``
            uses all codes (-8 … 7); ``"even"`` is symmetric with as many levels as there are codes and none at 0
            (-7.5 … 7.5; Liu et al. 2025, ParetoQ, https://arxiv.org/abs/2502.02631: best at 1 and 2 bits);
            ``"unsigned"`` starts at 0 (0 … 15).

    Raises:
        ValueError: If there are no such levels.

    Example:
        >>> grid_of(4), grid_of(2, "even")
        (Grid(lowest=-7, highest=7, zero_point=0.0), Grid(lowest=-2, highest=1, zero_point=-0.5))
    """
    if levels not in ("narrow", "full", "even", "unsigned"):
        raise ValueError(f"`levels` must be 'narrow', 'full', 'even' or 'unsigned', got {levels!r}.")
    smallest = 2 if levels == "narrow" else 1
    if not smallest <= bits <= 16:
        raise ValueError(f"`bits` must be from {smallest} to 16 for {levels!r} levels, got {bits}.")
    half = 2 ** (bits - 1)
    return {
        "narrow": Grid(1 - half, half - 1),
        "full": Grid(-half, half - 1),
        "even": Grid(-half, half - 1, -0.5),
        "unsigned": Grid(0, 2 * half - 1),
    }[levels]


def codes_of(
    values: Tensor, scale: Tensor | float, grid: Grid | RowGrid, zero_point: Tensor | float | None = None
) -> Tensor:
    """The code of the level that is nearest to each value, a whole number in ``values``' dtype; half rounds to even."""
    zero = grid.zero_point if zero_point is None else zero_point
    return _clamp_((values / scale + zero).round_(), grid.lowest, grid.highest)


def fake_quantize(
    values: Tensor,
    scale: Tensor | float,
    *,
    grid: Grid | RowGrid,
    zero_point: Tensor | float | None = None,
    scale_gradient: float | Tensor = 1.0,
) -> Tensor:
    r"""Each value's nearest level, with gradients to the values and to the step size.

    .. math:: Q(x) = s \left( \mathrm{clamp}(\mathrm{round}(x / s + z), l, h) - z \right)

    The gradient to a value is that of the output where the value lies within the levels, and 0 outside (the
    straight-through estimator: Bengio et al. 2013, https://arxiv.org/abs/1308.3432; masked as in Jacob et al. 2018,
    https://arxiv.org/abs/1712.05877). The gradient to the step is that of LSQ (Esser et al. 2020, section 2,
    https://arxiv.org/abs/1902.08153): rounding error over ``s`` inside, the outermost level over ``s`` outside.

    Args:
        values: Any shape.
        scale: Step ``s``, positive; broadcastable to ``values``.
        grid: The levels; see :func:`grid_of`. Of a :class:`RowGrid` each row has its own.
        zero_point: ``z``, the code of 0, where it is not ``grid``'s; a number or a tensor like ``scale``. Not trained.
        scale_gradient: Multiplies the gradient to ``scale``; see :func:`lsq_gradient_scale`.

    Returns:
        Shape and dtype of ``values``; computed in float32 or wider.

    Example:
        >>> fake_quantize(torch.tensor([-1.3, 0.04, 1.9]), 0.25, grid=grid_of(4))
        tensor([-1.2500,  0.0000,  1.7500])
    """
    wider = wide(values)
    if not isinstance(scale, Tensor):
        scale = wider.new_tensor(scale)
    zero = grid.zero_point if zero_point is None else zero_point
    quantized: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
        wider, scale, zero, grid.lowest, grid.highest, scale_gradient
    )
    return quantized.to(values.dtype)


def lsq_gradient_scale(numbers: float, grid: Grid | RowGrid) -> float | Tensor:
    """``1 / sqrt(numbers * highest)``: with it steps learn about as fast as what they are the steps of.

    Esser et al. (2020), section 2.2, https://arxiv.org/abs/1902.08153.

    Args:
        numbers: How many share a step, positive.
        grid: The levels.

    Returns:
        A number, or of a :class:`RowGrid` one for each row.

    Example:
        >>> lsq_gradient_scale(25, grid_of(2))
        0.2
    """
    if isinstance(grid, RowGrid):
        return (numbers * grid.highest.clamp_min(1)).rsqrt()
    return 1 / math.sqrt(numbers * max(grid.highest, 1))


def blend(values: Tensor, quantized: Tensor, alpha: float) -> Tensor:
    r"""Quantization that sets in little by little: :math:`(1 - \alpha) x + \alpha Q(x)`.

    Liu and Mattina (2019), https://arxiv.org/abs/1911.07190. Where ``quantized`` has a straight-through gradient, that
    of the blend is 1 inside the levels and ``1 - alpha`` outside.

    Args:
        values: Any shape.
        quantized: Same shape.
        alpha: 0 gives ``values``, 1 ``quantized``, exactly.

    Raises:
        ValueError: If ``alpha`` is outside [0, 1].

    Example:
        >>> blend(torch.tensor([-1.3]), torch.tensor([-1.25]), 0.5)
        tensor([-1.2750])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1], got {alpha}.")
    if alpha in (0, 1):
        return quantized if alpha == 1 else values
    return torch.lerp(values, quantized, alpha)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(  # with a `setup_context` of its own, every call would look at this signature again
        ctx: Any,
        values: Tensor,
        scale: Tensor,
        zero: Tensor | float,
        lowest: Tensor | int,
        highest: Tensor | int,
        scale_gradient: Tensor | float,
    ) -> Tensor:
        scale = scale.clamp_min(SMALLEST_SCALE)
        codes = values / scale
        if isinstance(zero, Tensor) or zero != 0:
            quantized = _clamp_(codes.add_(zero).round_(), lowest, highest).sub_(zero).mul_(scale)
        else:
            quantized = _clamp_(codes.round_(), lowest, highest).mul_(scale)
        ctx.save_for_backward(values, scale, quantized)
        ctx.zero, ctx.lowest, ctx.highest, ctx.scale_gradient = zero, lowest, highest, scale_gradient
        return quantized

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "Rounding has no second derivatives, so `create_graph=True` cannot go through it. Take them in "
                "floating point: `with full_precision(model): ...`."
            )
        # passes over memory are what this costs, new memory above all: few of them, and two buffers
        (gradient,) = gradients
        values, scale, quantized = ctx.saved_tensors
        half = (ctx.highest - ctx.lowest) / 2
        place = values / (scale * half)  # the outermost levels are at -1 and 1
        middle = ((ctx.highest + ctx.lowest) / 2 - ctx.zero) / half
        if isinstance(middle, Tensor) or middle != 0:
            place.sub_(middle)
        to_scale = None
        if ctx.needs_input_grad[1]:
            inside = _inside(values, place, out=torch.empty_like(values))
            change = torch.sub(quantized, inside, out=inside)
            to_scale = change.mul_(gradient).sum_to_size(scale.shape) / scale * ctx.scale_gradient
        to_values = _inside(gradient, place, out=place) if ctx.needs_input_grad[0] else None
        return to_values, to_scale, None, None, None, None


def _inside(numbers: Tensor, place: Tensor, *, out: Tensor) -> Tensor:
    """``numbers`` where ``place`` is from -1 to 1, up to rounding, else 0; in one pass."""
    chosen: Tensor = torch.ops.aten.hardtanh_backward.grad_input(numbers, place, -1 - 1e-6, 1 + 1e-6, grad_input=out)
    return chosen


def _clamp_(codes: Tensor, lowest: Tensor | int, highest: Tensor | int) -> Tensor:
    """``codes`` within their bounds, in place."""
    if isinstance(lowest, Tensor) or isinstance(highest, Tensor):  # twice as fast as `clamp_` with tensors
        return codes.clamp_min_(lowest).clamp_max_(highest)
    return codes.clamp_(lowest, highest)
