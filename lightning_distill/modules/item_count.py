"""One gradient for an optimizer step, however its items are split over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

Count = int | Tensor


class ItemCount:
    """Makes the gradient of an optimizer step the mean over all of its items.

    Trainers average the *means* of micro-batches and ranks, which counts an item in a small or mostly masked part for
    more than one in a full part. Here each part's mean loss is scaled by its number of items over a reference that all
    parts share, and the summed gradient is corrected once, when the number of items in the whole step is known:
    no look-ahead, no second backward.

    Use :meth:`scale` on each part's mean loss and :meth:`correct` before the optimizer steps.
    """

    def __init__(self) -> None:
        self._reference: Count = 1
        self._counts: list[Count] = []

    def scale(self, loss: Tensor, count: Count, *, over_ranks: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """``loss``, the mean over ``count`` items, such that :meth:`correct` makes the sum right.

        Args:
            loss: Scalar.
            count: Items of this part that count; a tensor stays on its device.
            over_ranks: Mean of a scalar over the processes; ``None`` for a single process.
        """
        if not self._counts:
            self._reference = _mean(count, loss.device, over_ranks)
        self._counts.append(count)
        if isinstance(count, int) and isinstance(self._reference, int) and count == self._reference:
            return loss
        return loss * (count / self._reference)

    def correct(
        self,
        parameters: Iterable[nn.Parameter],
        accumulate: int,
        *,
        over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Turn the accumulated gradients into those of the mean over all items of the step.

        Args:
            parameters: Those with gradients.
            accumulate: By how much each part's loss was divided (``accumulate_grad_batches``).
            over_ranks: As in :meth:`scale`.
        """
        counts, self._counts = self._counts, []
        if len(counts) == accumulate == 1:
            return  # the reference was this very number
        total = counts[0] if len(counts) == 1 else sum(counts[1:], start=counts[0])
        total = _mean(total, None, over_ranks)
        factor = self._reference * accumulate / total
        if isinstance(factor, float) and factor == 1:
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def _mean(count: Count, device: torch.device | None, over_ranks: Callable[[Tensor], Tensor] | None) -> Count:
    """Mean of ``count`` over the processes, at least 1."""
    if over_ranks is not None:
        count = over_ranks(torch.as_tensor(count, dtype=torch.float32, device=device))
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)
