"""Pairs of taps, and the weight of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Pairs = tuple[tuple[str, str], ...]


def checked_pairs(pairs: Mapping[str, str]) -> Pairs:
    """``pairs`` as a tuple.

    Raises:
        ValueError: If there are none.
    """
    if not isinstance(pairs, Mapping) or not pairs:
        raise ValueError(f"`pairs` must map taps of the student to taps of the teacher, got {pairs!r}.")
    return tuple(pairs.items())


def checked_weights(weights: Sequence[float] | None, pairs: Pairs) -> list[float]:
    """A weight for each pair, by default one over their number.

    Raises:
        ValueError: If they are not as many as the pairs, or one is negative.
    """
    if weights is None:
        return [1 / len(pairs)] * len(pairs)
    if len(weights) != len(pairs):
        raise ValueError(f"`weights` must have one number for each of the {len(pairs)} pairs, got {len(weights)}.")
    for pair, weight in zip(pairs, weights, strict=True):
        if not weight >= 0:  # also rejects NaN
            raise ValueError(f"The weight of the pair {pair} must not be negative, got {weight}.")
    return [float(weight) for weight in weights]
