"""How much a network would lose without a channel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.compression.channels import ChannelGroup, Slice, per_channel
from lightning_distill.losses.term import reduce_items
from lightning_distill.modes import inference
from lightning_distill.outputs import Step
from lightning_distill.tasks import Task


def magnitude_importance(network: nn.Module, group: ChannelGroup) -> Tensor:
    """Squared weights that would go with each channel, of the layers that make it and of those that read it.

    Each weight counts relative to its mean over channels, so that scales that a later layer undoes do not matter
    (group norm, Fang et al. 2023, https://arxiv.org/abs/2301.12900, section 3.3). The mean over channels is 1.

    Returns:
        Shape ``(channels,)``, float32 or wider, not negative.
    """
    parts = []
    for part in group.slices:
        weight: Any = getattr(network.get_submodule(part.name), "weight", None)
        if weight is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            sums = _on_channels(
                group, part, per_channel(_layer(network, part), part.side, weight.detach().to(wide) ** 2)
            )
            parts.append(sums / sums.mean().clamp_min(torch.finfo(sums.dtype).tiny))
    return torch.stack(parts).mean(0)


def taylor_importance(
    network: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[Any], task: Task
) -> dict[str, Tensor]:
    r"""Squared first-order change of the loss if nobody reads a channel: :math:`(\sum_w g_w w)^2`, mean over batches.

    The sum is over all weights that read the channel, which is the gradient of a gate on it (Molchanov et al. 2019,
    https://arxiv.org/abs/1906.10771, section 3). In eval mode, on labels.

    Args:
        network: The network; it is not changed.
        groups: Of its channels.
        batches: A few batches of training data with labels.
        task: How a batch is read, and its loss.

    Returns:
        By name of a group, shape ``(channels,)``, float32.

    Raises:
        ValueError: If there are no batches, or one has no labels.
    """
    readers = {part.name for group in groups for part in group.slices if part.side == "in"}
    weights: dict[str, Any] = {name: network.get_submodule(name).weight for name in sorted(readers)}
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    totals = {group.name: torch.zeros(group.channels) for group in groups}
    seen = 0
    with inference(network), torch.enable_grad():
        try:
            for weight in weights.values():
                weight.requires_grad_(True)
            for batch in batches:
                gradients = torch.autograd.grad(_loss(network, batch, task), list(weights.values()), allow_unused=True)
                products = {
                    name: torch.zeros_like(weight) if gradient is None else (gradient * weight).detach().float()
                    for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
                }
                for group in groups:
                    gates = torch.zeros(group.channels)
                    for part in group.slices:
                        if part.side == "in":
                            sums = per_channel(_layer(network, part), "in", products[part.name])
                            gates += _on_channels(group, part, sums.cpu())
                    totals[group.name] += gates.square()
                seen += 1
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(flags[name])
    if seen == 0:
        raise ValueError("`batches` is empty: there is nothing to take gradients of.")
    return {name: total / seen for name, total in totals.items()}


def _loss(network: nn.Module, batch: Any, task: Task) -> Tensor:
    outputs, labels = task.run(network, batch), task.labels(batch)
    if labels is None:
        raise ValueError("The batch has no labels, which the importance `taylor` needs.")
    values = task.hard_term()(Step(batch=batch, student=outputs, labels=labels))
    return reduce_items(values, task.mask(batch, outputs))


def _layer(network: nn.Module, part: Slice) -> nn.Module:
    return network.get_submodule(part.name)


def _on_channels(group: ChannelGroup, part: Slice, values: Tensor) -> Tensor:
    positions = torch.tensor(part.positions, device=values.device)
    channels = torch.tensor(part.channels, device=values.device)
    return values.new_zeros(group.channels).index_add(0, channels, values[positions])
