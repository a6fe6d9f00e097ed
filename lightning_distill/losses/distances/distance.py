"""The interface of a distance between features."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Distance(Protocol):
    """A function of two features ``(B, *positions, d)``.

    The result is a tensor; ``Any`` here lets the command line build objects with such a call.
    """

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Any:
        """A value per position, per sample, or a scalar; ``mask``, ``(B, *positions)``, tells what counts."""
