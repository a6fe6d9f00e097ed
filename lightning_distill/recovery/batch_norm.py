"""New statistics for batch normalizations whose inputs have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_distill.tasks import Classification, Task

Statistics = Literal["pooled", "cumulative"]


class Moments:
    """Mean and variance of each channel over batches.

    ``"pooled"`` are those of all values together. ``"cumulative"`` are the means of the batches' means and variances,
    as ``torch.optim.swa_utils.update_bn`` has them: they lack the variance between batches.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, Tensor, Tensor]] = []  # count, mean, sum of squared deviations

    def add(self, values: Tensor) -> None:
        """Take in a batch, shape ``(B, C, ...)``."""
        rows = values.detach().double().movedim(1, 0).flatten(1)
        mean = rows.mean(dim=1)
        self._rows.append((rows.shape[1], mean, (rows - mean[:, None]).square().sum(dim=1)))

    @property
    def empty(self) -> bool:
        """Whether there was no batch."""
        return not self._rows

    def statistics(self, kind: Statistics) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, shape ``(C,)`` each, float64."""
        counts = torch.tensor([count for count, _, _ in self._rows], dtype=torch.float64)
        means = torch.stack([mean for _, mean, _ in self._rows])
        within = torch.stack([squares for _, _, squares in self._rows])
        counts = counts[:, None].to(means.device)
        if kind == "cumulative":
            return means.mean(dim=0), (within / (counts - 1).clamp_min(1)).mean(dim=0)
        total = counts.sum()
        mean = (counts * means).sum(dim=0) / total
        squares = within.sum(dim=0) + (counts * (means - mean).square()).sum(dim=0)
        return mean, squares / (total - 1).clamp_min(1)


@torch.no_grad()
def recalibrate_batch_norm(
    network: nn.Module, batches: Iterable[Any], *, statistics: Statistics = "pooled", task: Task | None = None
) -> int:
    """Set the running statistics of every batch normalization to those of ``batches``, as the network is now.

    Rounded weights shift and stretch what reaches the normalizations; the statistics from before the rounding no longer
    fit. No label is needed, and no weight is changed. While the batches pass, each normalization uses the batch's own
    statistics; everything else is as in evaluation.

    Args:
        network: Changed in place.
        batches: A few hundred samples are enough.
        statistics: ``"pooled"``, over all values, or ``"cumulative"``, the mean over batches, as PyTorch's
            ``update_bn``; the latter lacks the variance between batches.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.

    Returns:
        Number of normalizations that were set.

    Raises:
        ValueError: If the network has no batch normalization with running statistics, ``statistics`` is unknown, or
            there are no batches.
    """
    if statistics not in ("pooled", "cumulative"):
        raise ValueError(f"`statistics` must be 'pooled' or 'cumulative', got {statistics!r}.")
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ValueError(
            f"{type(network).__name__} has no batch normalization with running statistics to recalibrate. Use "
            "`correct_bias` instead."
        )
    task = Classification() if task is None else task
    moments = {norm: Moments() for norm in norms}
    modes = {module: module.training for module in network.modules()}
    kept = {norm: (norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms}
    handles = [norm.register_forward_pre_hook(_watch(found)) for norm, found in moments.items()]
    ran = False
    try:
        for module in modes:
            module.training = module in moments
        for norm in norms:  # with none of its own it takes the batch's
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
        for batch in batches:
            task.run(network, batch)
            ran = True
    finally:
        for handle in handles:
            handle.remove()
        for norm, (mean, variance, seen) in kept.items():
            norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, seen
        for module, training in modes.items():
            module.training = training
    if not ran:
        raise ValueError("`batches` is empty: there is nothing to take statistics from.")
    for norm, found in moments.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        if found.empty:  # a branch that these batches do not take
            continue
        mean, variance = found.statistics(statistics)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
    return sum(not found.empty for found in moments.values())


def _watch(moments: Moments) -> Any:
    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0])

    return look


__all__ = ["Moments", "Statistics", "recalibrate_batch_norm"]
