"""Weights of layers by their depth."""

from __future__ import annotations

from typing import Literal


def depth_weights(layers: int, *, normalise: Literal["sum", "max"] = "sum") -> list[float]:
    """Weights proportional to the depth of a layer, ``l / L`` for ``l = 1 … L``: deeper layers count for more.

    A heuristic; features should be brought to one scale (layer norm, unit length) before layers are added up.

    Args:
        layers: Number of layers ``L``, positive.
        normalise: ``"sum"`` makes the weights sum to 1, ``"max"`` makes the last one 1.

    Returns:
        One weight per layer, from the first to the last.

    Raises:
        ValueError: If ``layers`` is not positive or ``normalise`` is unknown.

    Example:
        >>> depth_weights(4)
        [0.1, 0.2, 0.3, 0.4]
    """
    if not layers > 0:
        raise ValueError(f"`layers` must be positive, got {layers}.")
    if normalise not in ("sum", "max"):
        raise ValueError(f"`normalise` must be 'sum' or 'max', got {normalise!r}.")
    total = layers * (layers + 1) // 2 if normalise == "sum" else layers
    return [layer / total for layer in range(1, layers + 1)]
