"""The losses of a run's terms, summed on the device and read once in a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class LossLog:
    """Running means of the terms' losses between two log entries.

    Nothing is copied to the host and nothing handed to a logger per step: on small models that would cost more than the
    losses themselves.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._sum: Tensor | None = None
        self._steps = 0

    def add(self, losses: Mapping[str, Tensor], total: Tensor) -> None:
        """Add one batch's losses, scalars by term name, and their weighted ``total``."""
        with torch.no_grad():
            values = torch.stack([value.detach().float() for value in (*losses.values(), total)])
            self._sum = values if self._sum is None else self._sum.add_(values)
        self._names = tuple(losses)
        self._steps += 1

    def flush(
        self, weights: Mapping[str, float | Tensor], over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """Means since the last flush: ``train/loss``, each term raw, and each term times its weight.

        Raises:
            FloatingPointError: If a term is not finite; the message names it.
        """
        if self._sum is None:
            return {}
        mean = self._sum / self._steps
        self._sum, self._steps = None, 0
        if over_ranks is not None:
            mean = over_ranks(mean)
        *terms, total = mean.tolist()
        losses = dict(zip(self._names, terms, strict=True))
        entry = {"train/loss": total}
        for name, value in losses.items():
            entry[f"train/{name}"] = value
            if name in weights:  # the parts of a term have none of their own
                entry[f"train_weighted/{name}"] = float(weights[name]) * value
        _refuse_non_finite(losses, total)
        return entry


def _refuse_non_finite(losses: Mapping[str, float], total: float) -> None:
    wrong = {name: value for name, value in (*losses.items(), ("the sum", total)) if not abs(value) < float("inf")}
    if wrong:
        names = ", ".join(f"{name} = {value}" for name, value in wrong.items())
        raise FloatingPointError(
            f"A loss is not finite: {names}. Look at the inputs and the learning rate; "
            "`Trainer(detect_anomaly=True)` finds the operation, `gradient_clip_val` often prevents it."
        )
