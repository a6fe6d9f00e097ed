"""The loss of finding one's own among many."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def info_nce(
    similarity: Tensor,
    positives: Tensor | None = None,
    *,
    temperature: float = 0.07,
    excluded: Tensor | None = None,
    include_positive: bool = True,
) -> Tensor:
    r"""Cross-entropy of finding the candidate that belongs to each row among all candidates, nats.

    .. math:: -\log \frac{\exp(s^+ / \tau)}{\exp(s^+ / \tau) + \sum_- \exp(s^- / \tau)}

    InfoNCE (van den Oord et al. 2018, equation 4). Without the positive in the denominator it is the decoupled variant
    (Yeh et al. 2022), which has no lower bound.

    Args:
        similarity: Of each row to each candidate, shape ``(..., N, M)``.
        positives: Number of each row's own candidate, shape ``(N,)``; by default its own number.
        temperature: ``tau``, positive; 0.03 to 0.5 for cosines. It has nothing to do with that of soft targets.
        excluded: Candidates that a row does not count as negatives, boolean, broadcastable to ``similarity``.
        include_positive: Whether the positive stands in the denominator.

    Returns:
        Shape ``(..., N)``, in float32 or wider; 0, without a gradient, for a row without negatives.

    Raises:
        ValueError: If ``temperature`` is not positive.

    Example:
        >>> info_nce(torch.eye(2), temperature=1.0)
        tensor([0.3133, 0.3133])
    """
    check_temperature(temperature)
    logits = similarity.to(torch.promote_types(similarity.dtype, torch.float32)) / temperature
    rows, candidates = logits.shape[-2:]
    if positives is None:
        positives = torch.arange(rows, device=logits.device)
    own = torch.arange(candidates, device=logits.device) == positives.unsqueeze(-1)
    negative = ~own if excluded is None else ~own & ~excluded
    positive = logits.gather(-1, positives.unsqueeze(-1).expand(*logits.shape[:-1], 1)).squeeze(-1)
    denominator = negative | own if include_positive else negative
    some = negative.any(dim=-1).expand(logits.shape[:-1])
    # A row of minus infinities has a gradient of NaN, which anomaly detection would stop at.
    kept = logits.masked_fill(~denominator, -math.inf).where(some.unsqueeze(-1), 0)
    return (kept.logsumexp(dim=-1) - positive).where(some, 0)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature by which similarities cannot be divided.

    Raises:
        ValueError: If it is not positive and finite.
    """
    if not 0 < temperature < math.inf:  # also rejects NaN
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
