"""Balancing by gradient norms (Chen et al. 2018): formulas."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_SHARE = 1e-3  # of the mean weight


def training_rates(losses: Tensor, first_losses: Tensor) -> Tensor:
    """Relative inverse training rate of each term: its remaining share of its first loss, over the mean share.

    Above 1 a term is slower than the others. Chen et al. (2018), section 3.1.

    Args:
        losses: Present losses, not negative, shape ``(T,)``.
        first_losses: Losses at the start, positive, same shape.

    Raises:
        ValueError: If a loss is negative or a first loss not positive.
    """
    if not bool((losses >= 0).all()) or not bool((first_losses > 0).all()):
        raise ValueError(
            "GradNorm compares each loss with its first value, so that losses must not be negative and first losses "
            f"must be positive; got {losses.tolist()} and {first_losses.tolist()}."
        )
    remaining = losses / first_losses
    return remaining / remaining.mean().clamp_min(torch.finfo(remaining.dtype).tiny)


def gradnorm_step(
    weights: Tensor, grad_norms: Tensor, rates: Tensor, *, alpha: float = 1.5, lr: float = 0.025
) -> Tensor:
    r"""One gradient step of the weights towards equal training rates, which keeps their sum.

    .. math:: w \leftarrow w - \eta \, \nabla_w \sum_i | w_i g_i - \overline{w g} \, r_i^\alpha |,

    the target held constant; then all weights are scaled so that their sum is what it was. Chen et al. (2018),
    algorithm 1, https://arxiv.org/abs/1711.02257. Since each part is the absolute value of a linear function, the
    gradient is ``g_i`` or ``-g_i``; no second backward is needed.

    Args:
        weights: Not negative, shape ``(T,)``.
        grad_norms: Norm of each *unweighted* term's gradient in the shared layer, same shape.
        rates: Of :func:`training_rates`.
        alpha: How much more a slow term is to pull, not negative; 0 asks for equal norms.
        lr: Step size.

    Returns:
        New weights, not below a thousandth of their mean.
    """
    weighted = weights * grad_norms
    target = weighted.mean() * rates**alpha
    moved = weights - lr * torch.sign(weighted - target) * grad_norms
    moved = moved.clamp_min(SMALLEST_SHARE * weights.mean())
    return moved * (weights.sum() / moved.sum())


def gradnorm_weights(grad_norms: Tensor, rates: Tensor, *, alpha: float = 1.5, total: float | None = None) -> Tensor:
    r"""The weights at which the norms are in proportion to the targets: :math:`w_i \propto r_i^\alpha / g_i`.

    It is where :func:`gradnorm_step` comes to rest for an ``alpha`` of 0 or 1, and near it otherwise, since the targets
    of the paper then do not add up to the norms.

    Args:
        grad_norms: Positive, shape ``(T,)``.
        rates: Of :func:`training_rates`.
        alpha: Not negative.
        total: Sum of the weights; by default their number.

    Example:
        >>> gradnorm_weights(torch.tensor([3.0, 1.0]), torch.ones(2))
        tensor([0.5000, 1.5000])
    """
    raw = rates**alpha / grad_norms
    return raw * ((len(raw) if total is None else total) / raw.sum())
