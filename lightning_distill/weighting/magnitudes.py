"""Weights that bring terms to one scale, from the size or the spread of their losses."""

from __future__ import annotations

import math

from torch import Tensor


def inverse_magnitude_weights(magnitudes: Tensor, *, total: float | None = None) -> Tensor:
    r"""Weights at which all terms contribute the same: :math:`w_i \propto 1 / m_i`.

    Args:
        magnitudes: Typical loss of each term, positive, shape ``(T,)``.
        total: Sum of the weights; by default their number.

    Raises:
        ValueError: If a magnitude is not positive.

    Example:
        >>> import torch
        >>> inverse_magnitude_weights(torch.tensor([3.0, 1.0]))
        tensor([0.5000, 1.5000])
    """
    if not bool((magnitudes > 0).all()):
        raise ValueError(f"`magnitudes` must be positive, got {magnitudes.tolist()}.")
    raw = 1 / magnitudes
    return raw * ((len(raw) if total is None else total) / raw.sum())


def variance_balanced_weight(reference_variance: float, variance: float) -> float:
    r"""Weight at which a loss fluctuates as much as a reference: :math:`\sqrt{V_\mathrm{ref} / V}`.

    A heuristic, not the solution of an optimization problem.

    Args:
        reference_variance: Of the loss with weight 1, not negative.
        variance: Of the loss to be weighed, positive.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> variance_balanced_weight(4.0, 0.25)
        4.0
    """
    if not 0 <= reference_variance < math.inf:
        raise ValueError(f"`reference_variance` must not be negative, got {reference_variance}.")
    if not 0 < variance < math.inf:
        raise ValueError(f"`variance` must be positive, got {variance}.")
    return math.sqrt(reference_variance / variance)


def quantization_error_moments(bits: int, value_range: float) -> tuple[float, float]:
    r"""Mean and variance of the squared error of uniform quantization.

    Rounding to steps of :math:`\Delta = R / (2^b - 1)` leaves an error that is nearly uniform in
    :math:`[-\Delta/2, \Delta/2]`; its square has mean :math:`\Delta^2 / 12` and variance :math:`\Delta^4 / 180`.

    Args:
        bits: ``b``, positive.
        value_range: ``R``, largest minus smallest value, positive.

    Raises:
        ValueError: If an argument is not positive.
    """
    for name, value in {"bits": bits, "value_range": value_range}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    step = value_range / (2**bits - 1)
    return step**2 / 12, step**4 / 180


def quantization_loss_weight(reference_variance: float, *, bits: int, value_range: float, elements: int) -> float:
    """:func:`variance_balanced_weight` of the mean squared quantization error of ``elements`` numbers.

    It grows with ``(2^bits - 1)^2``: by a factor of 289 from 4 to 8 bits.

    Args:
        reference_variance: Of the loss with weight 1, not negative.
        bits: Of the quantizer, positive.
        value_range: Largest minus smallest value, positive.
        elements: Over how many numbers the squared error is averaged, positive.

    Raises:
        ValueError: If an argument is outside its range.
    """
    if not elements > 0:
        raise ValueError(f"`elements` must be positive, got {elements}.")
    return variance_balanced_weight(reference_variance, quantization_error_moments(bits, value_range)[1] / elements)
