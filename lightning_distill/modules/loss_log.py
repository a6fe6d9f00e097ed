"""The losses of a run's terms, summed on the device and read once in a while."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

TOTAL = "loss"


class LossLog:
    """Running means of the terms' losses between two log entries.

    Nothing is copied to the host and nothing handed to a logger per step: on small models that would cost more than the
    losses themselves. The scalars of an interval are kept as they are and averaged at its end.
    """

    def __init__(self) -> None:
        self._values: defaultdict[str, list[Tensor]] = defaultdict(list)

    def add(self, losses: Mapping[str, Tensor], total: Tensor) -> None:
        """Add one batch's losses, scalars by term name, and their weighted ``total``."""
        for name, value in losses.items():
            self._values[name].append(value.detach())
        self._values[TOTAL].append(total.detach())

    def flush(
        self, weights: Mapping[str, float | Tensor], over_ranks: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, float]:
        """Means since the last flush: ``train/loss``, each term raw, each times its weight, and the present weights.

        Raises:
            FloatingPointError: If a term is not finite; the message names it.
        """
        if not self._values:
            return {}
        values, self._values = self._values, defaultdict(list)
        means = torch.stack([torch.stack(column).float().mean() for column in values.values()])
        if over_ranks is not None:
            means = over_ranks(means)
        losses = dict(zip(values, means.tolist(), strict=True))
        entry = {f"train/{name}": value for name, value in losses.items()}
        for name in losses.keys() & weights.keys():  # the parts of a term have no weight of their own
            weight = float(weights[name])
            entry[f"train_weighted/{name}"] = weight * losses[name]
            entry[f"train_weight/{name}"] = weight
        _refuse_non_finite(losses)
        return entry


def _refuse_non_finite(losses: Mapping[str, float]) -> None:
    wrong = [f"{name} = {value}" for name, value in losses.items() if not abs(value) < float("inf")]
    if wrong:
        raise FloatingPointError(
            f"A loss is not finite: {', '.join(wrong)}. Look at the inputs and the learning rate; "
            "`Trainer(detect_anomaly=True)` finds the operation, `gradient_clip_val` often prevents it."
        )
