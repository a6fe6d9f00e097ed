"""Terms on the student's features alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.losses.distances.inputs import mean_of_positions, without_autocast
from lightning_distill.losses.distances.relations import feature_correlation
from lightning_distill.losses.items import per_item
from lightning_distill.losses.term import Term
from lightning_distill.losses.transforms import channels_last
from lightning_distill.outputs import Step


def decorrelation(features: Tensor) -> Tensor:
    """Mean squared correlation between different features: 0 if each says something of its own, 1 if all say the same.

    The off-diagonal part of Barlow Twins and VICReg (Bardes et al. 2022, section 4.1), on correlations.

    Args:
        features: Shape ``(N, d)``.

    Returns:
        Scalar, in float32 or wider; 0 for one feature.
    """
    correlation = feature_correlation(features)
    width = len(correlation)
    off_diagonal = correlation.square().sum() - correlation.diagonal().square().sum()
    return off_diagonal / max(width * (width - 1), 1)


def activation_sparsity(features: Tensor) -> Tensor:
    """Mean positive activation over the channels, ``mean(relu(F))``: 0 if and only if nothing is active.

    Args:
        features: Shape ``(..., d)``.

    Returns:
        Shape ``(...)``, in float32 or wider.
    """
    return features.to(torch.promote_types(features.dtype, torch.float32)).relu().mean(dim=-1)


@without_autocast
def lipschitz_slopes(
    inputs: Tensor, outputs: Tensor, *, pairs: Literal["all", "neighbours"] = "all", eps: float = 1e-8
) -> Tensor:
    r"""Slopes :math:`\|f(x) - f(x')\| / \|x - x'\|` between samples.

    Each is a lower limit of the Lipschitz constant, a supremum; their mean is smaller, and smallest for a constant
    ``f``.

    Args:
        inputs: Shape ``(N, ...)``; of text, embeddings.
        outputs: Shape ``(N, ...)``.
        pairs: ``"all"`` pairs of two samples, or each with the ``"neighbours"`` in the batch (the last with the first).
        eps: Pairs with inputs nearer than this have slope 0.

    Returns:
        Shape ``(number of pairs,)``, in float32 or wider.

    Raises:
        ValueError: If the numbers of samples differ or ``pairs`` is unknown.
    """
    if len(inputs) != len(outputs):
        raise ValueError(f"`inputs` and `outputs` must be of the same samples, got {len(inputs)} and {len(outputs)}.")
    if pairs not in ("all", "neighbours"):
        raise ValueError(f"`pairs` must be 'all' or 'neighbours', got {pairs!r}.")
    wide = torch.promote_types(torch.promote_types(inputs.dtype, outputs.dtype), torch.float32)
    x, y = (side.to(wide).reshape(len(side), -1) for side in (inputs, outputs))
    if pairs == "neighbours":
        run = (x.roll(1, 0) - x).norm(dim=1)
        rise = (y.roll(1, 0) - y).norm(dim=1)
    else:
        run, rise = torch.pdist(x), torch.pdist(y)  # no N x N x d differences
    apart = run > eps
    slopes: Tensor = (rise / run.where(apart, 1)).where(apart, 0)
    return slopes


def lipschitz_penalty(
    inputs: Tensor,
    outputs: Tensor,
    *,
    pairs: Literal["all", "neighbours"] = "all",
    reduction: Literal["mean", "max", "softmax"] = "mean",
) -> Tensor:
    """One number for :func:`lipschitz_slopes`: mean, largest, or a mean that weighs large slopes more.

    Args:
        inputs: Shape ``(N, ...)``.
        outputs: Shape ``(N, ...)``.
        pairs: See :func:`lipschitz_slopes`.
        reduction: ``"mean"``, ``"max"``, or ``"softmax"``: weights proportional to the exponential of the slope
            over the mean slope, without a gradient through them.

    Returns:
        Scalar; 0 for fewer than two samples.

    Raises:
        ValueError: As :func:`lipschitz_slopes`, or if ``reduction`` is unknown.
    """
    if reduction not in ("mean", "max", "softmax"):
        raise ValueError(f"`reduction` must be 'mean', 'max' or 'softmax', got {reduction!r}.")
    slopes = lipschitz_slopes(inputs, outputs, pairs=pairs)
    if len(inputs) < 2:
        return slopes.sum() * 0
    if reduction == "mean":
        return slopes.mean()
    if reduction == "max":
        return slopes.amax()
    mean = slopes.detach().mean()
    weights = (slopes.detach() / mean.where(mean > 0, 1)).softmax(dim=0)
    return (weights * slopes).sum()


class Decorrelation(Term):
    """:func:`decorrelation` of the student's features at some taps, over all positions that count, mean over taps.

    It compares the features over a batch: the value depends on the batch size.

    Args:
        taps: Names of activations, one or more.
        channel_dim: Dimension of the channels; by default 1 for tensors of 4 and 5 dimensions, else the last.

    Raises:
        ValueError: If there are no taps.
    """

    needs_teacher = False

    def __init__(self, taps: Sequence[str], channel_dim: int | None = None) -> None:
        super().__init__()
        self.student_taps = _checked_taps(taps)
        self.channel_dim = channel_dim

    def forward(self, step: Step) -> Tensor:
        """Scalar."""
        values = []
        for name in self.student_taps:
            features = channels_last(step.student.features[name], self.channel_dim)
            mask = step.positions
            counted = mask is not None and mask.shape == features.shape[:-1]
            values.append(decorrelation(features[mask] if counted else features.flatten(0, -2)))
        return torch.stack(values).mean()


class ActivationSparsity(Term):
    """:func:`activation_sparsity` of the student's features at some taps, mean over taps.

    Args:
        taps: Names of activations, one or more; before or after their ReLU.
        channel_dim: Dimension of the channels; by default 1 for tensors of 4 and 5 dimensions, else the last.

    Raises:
        ValueError: If there are no taps.
    """

    needs_teacher = False

    def __init__(self, taps: Sequence[str], channel_dim: int | None = None) -> None:
        super().__init__()
        self.student_taps = _checked_taps(taps)
        self.channel_dim = channel_dim

    def forward(self, step: Step) -> Tensor:
        """Value of each item."""
        values = [
            per_item(activation_sparsity(channels_last(step.student.features[name], self.channel_dim)), step)
            for name in self.student_taps
        ]
        return torch.stack(values).mean(dim=0)


class LipschitzPenalty(Term):
    """:func:`lipschitz_penalty` of a part of the student between two taps, over the samples of the batch.

    Sequences are pooled over the positions that count. The value depends on the batch.

    Args:
        inputs: Tap of what goes in, as ``"blocks.0@input"``; it gets a gradient too where it has one.
        outputs: Tap of what comes out, as ``"blocks.3"``; by default the logits.
        pairs: See :func:`lipschitz_slopes`.
        reduction: See :func:`lipschitz_penalty`.

    Raises:
        ValueError: If ``pairs`` or ``reduction`` is unknown.
    """

    needs_teacher = False

    def __init__(
        self,
        inputs: str,
        outputs: str | None = None,
        pairs: Literal["all", "neighbours"] = "all",
        reduction: Literal["mean", "max", "softmax"] = "mean",
    ) -> None:
        super().__init__()
        lipschitz_penalty(torch.zeros(1, 1), torch.zeros(1, 1), pairs=pairs, reduction=reduction)  # checks the names
        self.student_taps = (inputs,) if outputs is None else (inputs, outputs)
        self.pairs: Literal["all", "neighbours"] = pairs
        self.reduction: Literal["mean", "max", "softmax"] = reduction

    def forward(self, step: Step) -> Tensor:
        """Scalar."""
        sides = [step.student.features[name] for name in self.student_taps]
        if len(sides) == 1:
            sides.append(step.student.logits)
        if step.positions is not None:
            sides = [mean_of_positions(s, step.positions) if s.ndim == 3 else s for s in sides]
        return lipschitz_penalty(sides[0], sides[1], pairs=self.pairs, reduction=self.reduction)


def _checked_taps(taps: Sequence[str]) -> tuple[str, ...]:
    if isinstance(taps, str) or len(taps) == 0:
        raise ValueError(f"`taps` must be a list of names of the student's activations, at least one, got {taps!r}.")
    return tuple(taps)
