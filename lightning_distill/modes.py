"""Running a network in the middle of its own training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def inference(network: nn.Module) -> Iterator[None]:
    """Within this context ``network`` is in eval mode and no gradients are recorded; afterwards nothing is left of it.

    The mode of each submodule is set and restored alone: parts that stay in eval mode on purpose keep it, and modules
    that do something when their mode is switched do not do it.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with inference(network):
        ...     network[0].training
        False
        >>> network[0].training, network[1].training
        (True, False)
    """
    trained = [module for module in network.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in trained:
            module.training = True
        # Before torch 2.11 autocast kept the casted weights of a pass without gradients, and the training pass that
        # used them again got none either: https://github.com/pytorch/pytorch/pull/165068
        torch.clear_autocast_cache()


def run_batch(network: nn.Module, batch: Any) -> Any:
    """What ``network`` says about a batch: a tensor, the first of a tuple, or a mapping of arguments.

    Example:
        >>> run_batch(nn.Identity(), (torch.ones(1), torch.zeros(1)))
        tensor([1.])
    """
    if isinstance(batch, Mapping):
        return network(**batch)
    return network(batch[0] if isinstance(batch, (tuple, list)) else batch)
