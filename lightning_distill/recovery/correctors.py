"""Small networks that correct the outputs of a quantized network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.modes import inference
from lightning_distill.tasks import Classification, Task, to_outputs


class OutputCalibrator(nn.Module):
    r"""A frozen network with a correction of its outputs, :math:`y = y_q + f(x, y_q)`.

    It is a student like any other: only the corrector is trained, say by ``KD(OutputCalibrator(quantized, corrector),
    teacher)``. A fresh corrector corrects nothing. A :class:`LinearCorrector` can be solved for instead:
    :func:`fit_linear_corrector`.

    Args:
        network: The quantized network; frozen, and always run in eval mode. It takes one tensor.
        corrector: Maps inputs ``(B, ...)`` and outputs ``(B, C)`` to a correction ``(B, C)``.
    """

    def __init__(self, network: nn.Module, corrector: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.corrector = corrector

    def forward(self, x: Tensor) -> Tensor:
        """Corrected outputs, shape ``(B, C)``."""
        with inference(self.network):
            said = to_outputs(self.network(x)).logits
        corrected: Tensor = said + self.corrector(x, said)
        return corrected


class LinearCorrector(nn.Module):
    r"""A linear correction, :math:`W [x; y] + b`; 0 at the beginning.

    Args:
        inputs: Number of values of a sample; 0 to look at the outputs alone.
        outputs: Number of outputs ``C``.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        if not (inputs >= 0 and outputs >= 1):
            raise ValueError(f"`inputs` must not be negative and `outputs` positive, got {inputs} and {outputs}.")
        self.inputs = inputs
        self.linear = _zero(nn.Linear(inputs + outputs, outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Correction ``(B, C)`` of outputs ``y``, ``(B, C)``, for inputs ``x``, ``(B, ...)``."""
        correction: Tensor = self.linear(_joined(x, y, self.inputs))
        return correction


class ResidualCorrector(nn.Module):
    r"""A correction by a network with one hidden layer over :math:`[x; y]`; 0 at the beginning.

    Args:
        inputs: Number of values of a sample; 0 to look at the outputs alone.
        outputs: Number of outputs ``C``.
        hidden: Units of the hidden layer, positive.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 32) -> None:
        super().__init__()
        if not (inputs >= 0 and outputs >= 1 and hidden >= 1):
            raise ValueError(
                f"`inputs` must not be negative, `outputs` and `hidden` positive, got {inputs}, {outputs} and {hidden}."
            )
        self.inputs = inputs
        self.layers = nn.Sequential(nn.Linear(inputs + outputs, hidden), nn.GELU(), _zero(nn.Linear(hidden, outputs)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Correction ``(B, C)`` of outputs ``y``, ``(B, C)``, for inputs ``x``, ``(B, ...)``."""
        correction: Tensor = self.layers(_joined(x, y, self.inputs))
        return correction


class AttentionCorrector(nn.Module):
    """A correction by attention: the outputs ask, the positions of the input answer; 0 at the beginning.

    Positions are told apart by a learned vector each.

    Args:
        channels: Channels ``d`` of the input: ``(B, d, *positions)``, or ``(B, T, d)`` with ``channels_last``.
        positions: Number of positions of the input.
        outputs: Number of outputs ``C``.
        width: Of queries and keys; a multiple of ``heads``.
        heads: Number of heads.
        channels_last: Whether the channels are the last dimension.

    Raises:
        ValueError: If a number is not positive, or ``width`` no multiple of ``heads``.
    """

    def __init__(
        self,
        channels: int,
        positions: int,
        outputs: int,
        width: int = 16,
        heads: int = 2,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "positions": positions, "outputs": outputs, "width": width, "heads": heads}
        for name, size in sizes.items():
            if not size >= 1:
                raise ValueError(f"`{name}` must be positive, got {size}.")
        if width % heads:
            raise ValueError(f"`width` must be a multiple of `heads`, got {width} and {heads}.")
        self.channels_last = channels_last
        self.query = nn.Linear(outputs, width)
        self.token = nn.Linear(channels, width)
        self.place = nn.Parameter(torch.randn(positions, width) / math.sqrt(width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.out = _zero(nn.Linear(width, outputs))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Correction ``(B, C)`` of outputs ``y``, ``(B, C)``, for inputs ``x``."""
        tokens = x.flatten(1, -2) if self.channels_last else x.flatten(2).transpose(1, 2)
        tokens = self.token(tokens) + self.place
        heard, _ = self.attention(self.query(y)[:, None], tokens, tokens, need_weights=False)
        correction: Tensor = self.out(heard[:, 0])
        return correction


def linear_correction(x: Tensor, y: Tensor, target: Tensor, *, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    r"""The linear correction of ``y`` towards ``target`` with the least squared error.

    .. math:: \min_{W, b} \| y + W [x; y] + b - \text{target} \|^2 + n \rho \| W \|^2

    Args:
        x: Inputs, shape ``(n, d)``; ``d`` may be 0.
        y: Outputs, shape ``(n, C)``.
        target: What they should be, shape ``(n, C)``.
        ridge: ``rho``, not negative. Needed where columns depend on each other, as pixels that are always 0 do.

    Returns:
        ``W``, shape ``(C, d + C)``, and ``b``, shape ``(C,)``; float64. The shortest solution, if there are several.

    Raises:
        ValueError: If the numbers of rows differ or ``ridge`` is negative.
    """
    if not len(x) == len(y) == len(target) or y.shape != target.shape or x.ndim != 2 or len(y) == 0:
        raise ValueError(
            "`x`, `y` and `target` must have the shapes (n, d), (n, C) and (n, C), got "
            f"{tuple(x.shape)}, {tuple(y.shape)} and {tuple(target.shape)}."
        )
    if not 0 <= ridge < math.inf:
        raise ValueError(f"`ridge` must be finite and not negative, got {ridge}.")
    columns = torch.cat([x, y], dim=1).double()
    wanted = (target - y).double()
    middle, offset = columns.mean(dim=0), wanted.mean(dim=0)
    centred, rest = columns - middle, wanted - offset
    if ridge == 0:
        weight = torch.linalg.lstsq(centred.cpu(), rest.cpu(), driver="gelsd").solution.to(centred.device)
    else:
        gram = centred.T @ centred
        gram.diagonal().add_(ridge * len(y))
        weight = torch.linalg.solve(gram, centred.T @ rest)
    return weight.T, offset - weight.T @ middle


def fit_linear_corrector(
    calibrator: OutputCalibrator,
    batches: Iterable[Any],
    teacher: nn.Module,
    *,
    ridge: float = 1e-3,
    task: Task | None = None,
) -> None:
    """Solve for the linear correction that brings a quantized network's outputs closest to the teacher's.

    Args:
        calibrator: With a :class:`LinearCorrector`, which is set in place.
        batches: Batches whose inputs are tensors; no label is needed.
        teacher: The network to follow, say the one before quantization; it is run in eval mode.
        ridge: See :func:`linear_correction`. With few samples for many inputs take more.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Raises:
        TypeError: If the corrector is another.
        ValueError: If there are no batches, or ``ridge`` is negative.
    """
    corrector = calibrator.corrector
    if not isinstance(corrector, LinearCorrector):
        raise TypeError(f"Only a `LinearCorrector` can be solved for; train a {type(corrector).__name__} with `KD`.")
    task = Classification() if task is None else task
    rows = []
    with inference(calibrator.network), inference(teacher):
        for batch in batches:
            x = _flat(task.inputs(batch), corrector.inputs)
            rows.append((x, task.run(calibrator.network, batch).logits, task.run(teacher, batch).logits))
    if not rows:
        raise ValueError("`batches` is empty: there is nothing to calibrate on.")
    weight, bias = linear_correction(*(torch.cat(part) for part in zip(*rows, strict=True)), ridge=ridge)
    with torch.no_grad():
        corrector.linear.weight.copy_(weight)
        corrector.linear.bias.copy_(bias)


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _flat(x: Tensor, inputs: int) -> Tensor:
    """Inputs, shape ``(B, inputs)``."""
    flat = x.flatten(1) if inputs > 0 else x.flatten(1)[:, :0]
    if flat.shape[1] != inputs:
        raise ValueError(f"The corrector was built for {inputs} inputs per sample, got {flat.shape[1]}.")
    return flat


def _joined(x: Tensor, y: Tensor, inputs: int) -> Tensor:
    return torch.cat([_flat(x, inputs).to(y.dtype), y], dim=1)


__all__ = [
    "AttentionCorrector",
    "LinearCorrector",
    "OutputCalibrator",
    "ResidualCorrector",
    "fit_linear_corrector",
    "linear_correction",
]
