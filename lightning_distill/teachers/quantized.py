"""Several quantized versions of one network as a teacher."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_distill.quantization import QuantSpec, calibrate, prepare
from lightning_distill.tasks import Classification, Task
from lightning_distill.teachers.past import MeanPrediction


def quantized_ensemble(
    network: nn.Module,
    specs: Sequence[QuantSpec],
    batches: Iterable[Any] = (),
    *,
    skip: Sequence[str] = (),
    task: Task | None = None,
) -> nn.Module:
    r"""Quantize copies of ``network`` in several ways; together they say the mean of their probabilities.

    .. math:: p = \frac1K \sum_k p_{Q_k}

    Its negative log-likelihood is never above the mean of the members' (Jensen). Give it to a module as ``teacher``.

    Args:
        network: In full precision; not changed.
        specs: How each copy is quantized: other bits, other levels, other granularity.
        batches: Samples for the ranges of what layers read; needed where a spec has ``activations``.
        skip: Names or patterns of layers that stay in floating point.
        task: How a batch is read; of one without probabilities the predictions are averaged. Default
            :class:`~lightning_distill.tasks.Classification`.

    Raises:
        ValueError: If there are no specs, ranges are needed and there are no batches, or as
            :func:`~lightning_distill.quantization.prepare`.

    Example:
        >>> import torch
        >>> ensemble = quantized_ensemble(nn.Linear(4, 3), [QuantSpec(2), QuantSpec(3)])
        >>> ensemble(torch.zeros(5, 4)).shape
        torch.Size([5, 3])
    """
    if not specs:
        raise ValueError("`specs` must hold at least one way to quantize the network.")
    task = Classification() if task is None else task
    batches = list(batches)
    members = []
    for spec in specs:
        member = prepare(copy.deepcopy(network), spec, skip=skip)
        calibrate(member, batches, run=task.run)
        members.append(member)
    return MeanPrediction(members, probabilities=task.imitable)


__all__ = ["quantized_ensemble"]
