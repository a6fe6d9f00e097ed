"""How unsure a network is of each item, and the threshold above which that is much."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_distill.outputs import UNLABELLED, Outputs
from lightning_distill.temperature import softened_entropy


def item_entropy(outputs: Outputs) -> Tensor:
    """Entropy of each item's prediction at temperature 1, nats, without a graph.

    Logits that stand as hidden states and an output layer are computed part by part and not kept.

    Args:
        outputs: What a network said.

    Returns:
        Shape of the items, in ``[0, log C]``, float32 or wider.
    """
    if not outputs.has_logits and getattr(outputs.head, "weight", None) is None:
        _ = outputs.logits  # computed once and kept, so with the graph that the loss terms need
    with torch.no_grad():
        return torch.cat([softened_entropy(part) for _, part in outputs.chunks()])


@torch.no_grad()
def percentile_threshold(uncertainty: Tensor, q: float = 90.0, *, mask: Tensor | None = None) -> Tensor:
    """The value that ``q`` percent of the items do not exceed (linear between neighbours).

    Args:
        uncertainty: One value per item, any shape.
        q: In [0, 100]; 90 leaves the top tenth above.
        mask: Which items count, boolean, same shape.

    Returns:
        Scalar, float32 or wider; infinity if no item counts, so that none is above.

    Raises:
        ValueError: If ``q`` is outside its range.

    Example:
        >>> percentile_threshold(torch.tensor([0.1, 0.2, 0.3]), 50.0)
        tensor(0.2000)
    """
    require_percentile(q)
    values = _counted(uncertainty, mask)
    if values.numel() == 0:
        return values.new_tensor(math.inf)
    # torch.quantile refuses more than 2**24 values, which are few tokens for a large batch
    ordered = values.sort().values
    position = (values.numel() - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, values.numel() - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@torch.no_grad()
def dynamic_threshold(
    uncertainty: Tensor, *, tau0: float, beta: float, maximum: float = math.inf, mask: Tensor | None = None
) -> Tensor:
    r"""Threshold :math:`\tau_0 (1 + \beta \mathrm{Var}(u))`, at most ``maximum``.

    The variance (nats², the mean of squared deviations) has no bound below that of the entropies; ``log C`` as
    ``maximum`` keeps the threshold where there are entropies.

    Args:
        uncertainty: One value per item, any shape.
        tau0: Threshold for items that are all alike, not negative, nats.
        beta: Growth per nat², not negative.
        maximum: Highest result.
        mask: Which items count, boolean, same shape.

    Returns:
        Scalar, float32 or wider; ``tau0`` if no item counts.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> dynamic_threshold(torch.tensor([0.0, 1.0]), tau0=0.5, beta=2.0)
        tensor(0.7500)
    """
    require_not_negative(tau0=tau0, beta=beta)
    values = _counted(uncertainty, mask)
    variance = values.var(correction=0) if values.numel() > 0 else values.new_zeros(())
    return (tau0 * (1 + beta * variance)).clamp_max(maximum)


@torch.no_grad()
def class_thresholds(
    uncertainty: Tensor,
    labels: Tensor,
    classes: int,
    q: float = 90.0,
    *,
    min_count: int = 1,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`percentile_threshold` of each class, so that every class keeps about the same share of its items.

    Args:
        uncertainty: One value per item, any shape.
        labels: Class of each item, same shape. Items labelled ``-100`` belong to no class and count for the
            threshold of all.
        classes: Number of classes ``K``.
        q: In [0, 100].
        min_count: A class with fewer items than this gets the threshold of all items; at least 1.
        mask: Which items count, boolean, same shape.

    Returns:
        Shape ``(K,)``, float32 or wider.

    Raises:
        ValueError: If the shapes differ or an argument is outside its range.

    Example:
        >>> class_thresholds(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0, 0, 1]), 2, 50.0)
        tensor([0.5000, 5.0000])
    """
    if labels.shape != uncertainty.shape:
        raise ValueError(
            "`uncertainty` and `labels` must have the same shape, got "
            f"{tuple(uncertainty.shape)} and {tuple(labels.shape)}."
        )
    require_classes(classes, min_count)
    values, of_class = _counted(uncertainty, mask), labels if mask is None else labels[mask]
    general = percentile_threshold(values, q)
    parts = [values[of_class.flatten() == k] for k in range(classes)]
    return torch.stack([general if part.numel() < min_count else percentile_threshold(part, q) for part in parts])


def class_of_items(labels: Tensor | None, teacher: Outputs | None) -> Tensor | None:
    """Class of each item: its label or, without one, the teacher's decision; ``-100`` where there is neither.

    Returns:
        Integers of the item shape; ``None`` if nothing is known of any item.
    """
    given = labels if labels is not None and not labels.is_floating_point() else None
    if teacher is None or (given is not None and not bool((given == UNLABELLED).any())):
        return given
    with torch.no_grad():
        decided = torch.cat([part.argmax(dim=-1) for _, part in teacher.chunks()])
    return decided if given is None else torch.where(given == UNLABELLED, decided, given)


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values that count, flat, float32 or wider."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return (values if mask is None else values[mask]).flatten()


def require_percentile(q: float) -> None:
    """Refuse what is no percentile."""
    if not 0 <= q <= 100:  # also rejects NaN, here and below
        raise ValueError(f"`q`, a percentile, must be in [0, 100], got {q}.")


def require_not_negative(**values: float) -> None:
    """Refuse negative and infinite numbers by their name."""
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must not be negative, got {value}.")


def require_classes(classes: int, min_count: int) -> None:
    """Refuse a number of classes or items below 1."""
    for name, value in {"classes": classes, "min_count": min_count}.items():
        if not value >= 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
