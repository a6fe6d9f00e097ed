"""From values along a sequence or a map to one value per item."""

from __future__ import annotations

from torch import Tensor

from lightning_distill.outputs import Step


def per_item(values: Tensor, step: Step, positions: Tensor | None = None) -> Tensor:
    """One value for each item of ``step``, from one per position or per sample.

    Items are samples, or, for a causal language model, the tokens that count. A sample's value is the mean over its
    positions that count, 0 if there are none. Where tokens are the items, a value per position becomes the value of
    its token, and a value per sample that of each of its tokens.

    Args:
        values: Shape ``(B, P...)``, one per position, or ``(B,)``, one per sample; a scalar is returned as it is.
        step: Tells the positions that count, and what the items are.
        positions: Those positions where they are not ``step.positions`` (after pooling), boolean, ``(B, P...)``.

    Returns:
        Shape ``(B,)``, or ``(n,)`` for ``n`` tokens that count.
    """
    if values.ndim == 0:
        return values
    if positions is None and step.positions is not None and step.positions.shape == values.shape:
        positions = step.positions
    if step.token_items and positions is not None and positions is step.positions:
        return values[positions]
    if values.ndim > 1:
        values = _mean_of_positions(values, positions)
    if step.token_items and step.positions is not None:
        return values.repeat_interleave(step.positions.sum(dim=1))
    return values


def _mean_of_positions(values: Tensor, positions: Tensor | None) -> Tensor:
    values = values.flatten(1)
    if positions is None:
        return values.mean(dim=1)
    positions = positions.flatten(1)
    return values.where(positions, 0).sum(dim=1) / positions.sum(dim=1).clamp_min(1)
