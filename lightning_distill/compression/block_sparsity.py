"""Which blocks of weights are given up, and when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["layer", "global"]


def block_mask(importance: Tensor, sparsity: float, *, kept: Tensor | None = None) -> Tensor:
    """Which blocks stay: all but the share ``sparsity`` that is worth least, rounded to a whole block.

    Args:
        importance: Of each block, shape ``(rows, columns)``.
        sparsity: Share of the blocks that goes, in [0, 1). One block always stays.
        kept: Blocks that are still there, boolean, same shape; the others stay gone. Default: all.

    Returns:
        Boolean, same shape. Of equally important blocks the first ones go, row by row.

    Raises:
        ValueError: If ``sparsity`` is outside [0, 1), or an importance is not finite.

    Example:
        >>> block_mask(torch.tensor([[0.3, 0.1], [0.2, 0.4]]), 0.5)
        tensor([[ True, False],
                [False,  True]])
    """
    return block_masks({"": importance}, sparsity, kept=None if kept is None else {"": kept})[""]


def block_masks(
    importance: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: Scope = "layer",
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Which blocks of several layers stay; see :func:`block_mask`.

    Args:
        importance: Of the blocks of each layer, shapes ``(rows, columns)``.
        sparsity: Share of the blocks that goes, in [0, 1).
        scope: ``"layer"``: of each layer; ``"global"``: of all together, the least important ones wherever they are.
            Each layer keeps its most important block.
        kept: Blocks that are still there, by layer, at least one in each; the others stay gone. Default: all.

    Returns:
        Boolean masks on the CPU, by layer.

    Raises:
        ValueError: If ``sparsity`` is outside [0, 1), ``scope`` is unknown, or an importance is not finite.
    """
    check_sparsity("sparsity", sparsity)
    if scope not in ("layer", "global"):
        raise ValueError(f"`scope` must be 'layer' or 'global', got {scope!r}.")
    if kept is None:
        kept = {name: torch.ones_like(values, dtype=torch.bool) for name, values in importance.items()}
    worth = {name: _worth(name, values, kept[name]) for name, values in importance.items()}
    if scope == "layer":
        chosen = {name: _most_valuable(values, sparsity) for name, values in worth.items()}
    else:
        together = _most_valuable(torch.cat(list(worth.values())), sparsity)
        chosen = dict(zip(worth, together.split([len(values) for values in worth.values()]), strict=True))
    return {name: mask.view(importance[name].shape) for name, mask in chosen.items()}


def cubic_sparsity(step: float, *, start: float, end: float, final: float, initial: float = 0.0) -> float:
    r"""Sparsity that rises fast at first and slowly at the end.

    .. math:: s(t) = s_f + (s_i - s_f) \left( 1 - \frac{t - t_0}{t_1 - t_0} \right)^3

    from ``initial`` before ``start`` to ``final`` from ``end`` on: Zhu and Gupta (2017), section 3,
    https://arxiv.org/abs/1710.01878.

    Args:
        step: Optimizer steps done.
        start: Step at which it begins to rise, not negative.
        end: Step at which it arrives, at least ``start``; where both are equal it jumps.
        final: In [0, 1).
        initial: In [0, 1), at most ``final``.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> [round(cubic_sparsity(step, start=0, end=10, final=0.8), 3) for step in (0, 5, 10)]
        [0.0, 0.7, 0.8]
    """
    check_sparsity("final", final)
    check_sparsity("initial", initial)
    if not initial <= final:
        raise ValueError(f"`initial` must be at most `final`, since blocks do not return, got {initial} and {final}.")
    if not 0 <= start <= end < math.inf:
        raise ValueError(f"`start` must not be negative and `end` not be before it, got {start} and {end}.")
    if step < start:
        return initial
    if step >= end:
        return final
    return final + (initial - final) * (1 - (step - start) / (end - start)) ** 3


def check_sparsity(name: str, value: float) -> None:
    """Refuse a share of blocks that would leave nothing.

    Raises:
        ValueError: If it is outside [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"`{name}`, a share of blocks, must be in [0, 1), got {value}.")


def _worth(name: str, importance: Tensor, kept: Tensor) -> Tensor:
    """What each block is worth: nothing at all where it has gone, everything for the layer's best one."""
    values = importance.detach().double().cpu().flatten()
    of_layer = f" of {name!r}" if name else ""
    if not values.isfinite().all():
        raise ValueError(
            f"The importance of blocks{of_layer} is not finite: weights or gradients are NaN or infinite. Lower the "
            "learning rate or clip gradients."
        )
    still_there = kept.cpu().flatten()
    if not still_there.any():
        raise ValueError(f"`kept` has no block{of_layer}; one must stay.")
    values = torch.where(still_there, values, -math.inf)
    values[(values == values.max()).nonzero()[-1]] = math.inf
    return values


def _most_valuable(worth: Tensor, sparsity: float) -> Tensor:
    """Mask without the least valuable of the blocks; those that have gone or must stay are not up for choice."""
    wanted = math.floor(sparsity * len(worth) + 0.5)
    going = min(max(wanted, int((worth == -math.inf).sum())), len(worth) - int((worth == math.inf).sum()))
    if going == 0:
        return torch.ones(len(worth), dtype=torch.bool)
    limit = worth.kthvalue(going).values  # many times faster than sorting millions of single weights
    mask = worth > limit
    equal = (worth == limit).nonzero().flatten()
    mask[equal[going - int((worth < limit).sum()) :]] = True
    return mask
