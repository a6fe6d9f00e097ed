"""Backward passes that only measure, before the one that trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_depth = 0  # plain, since autograd runs backward passes on threads of its own


@contextmanager
def measuring() -> Iterator[None]:
    """Within this context a backward pass leaves everything in place for the next one.

    For functions that throw away or overwrite their gradients when they hand them out, such as the fused losses.
    """
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def is_measuring() -> bool:
    """Whether some caller is within :func:`measuring`."""
    return _depth > 0
