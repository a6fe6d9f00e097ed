"""What rounded weights do to a network's outputs: measured, or estimated from gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.bit_search.quantized import QuantizedWeights
from lightning_distill.bit_search.rounding import RoundedWeights
from lightning_distill.modes import inference
from lightning_distill.outputs import Outputs
from lightning_distill.quantization.spec import Bits
from lightning_distill.tasks import Task


class PlanLoss:
    """How far a network with few bits is from itself: the mean over items of a divergence, no label needed.

    For classifiers and language models ``KL(network || rounded)`` in nats; for other tasks the squared difference.

    Args:
        network: The network.
        rounded: Its weights at several numbers of bits.
        batches: What the outputs are compared on.
        task: How a batch is read.

    Raises:
        ValueError: If there are no batches.
    """

    def __init__(
        self, network: nn.Module, rounded: RoundedWeights | QuantizedWeights, batches: Iterable[Any], task: Task
    ) -> None:
        self.network = network
        self.rounded = rounded
        self.task = task
        self._batches = list(batches)
        if not self._batches:
            raise ValueError("`batches` is empty: there is nothing to compare outputs on.")
        with inference(network), rounded.original():
            self._own = [self._said(batch) for batch in self._batches]

    def __call__(self, plan: Mapping[str, Bits]) -> float:
        """Divergence of the network with the weights of ``plan``."""
        total, items = 0.0, 0
        with inference(self.network), self.rounded.applied(plan):
            for batch, own in zip(self._batches, self._own, strict=True):
                values = divergence(own, self._said(batch), probabilities=self.task.imitable)
                total, items = total + values.double().sum().item(), items + values.numel()
        return total / max(items, 1)

    def _said(self, batch: Any) -> Tensor:
        return counted(self.task.run(self.network, batch), batch, self.task)


def divergence(own: Tensor, other: Tensor, *, probabilities: bool = True) -> Tensor:
    """How far ``other`` is from ``own``, of each item.

    Args:
        own: Logits or predictions, shape ``(items, C)``.
        other: Same shape.
        probabilities: Whether they are logits: then ``KL(own || other)`` in nats, otherwise the squared difference.

    Returns:
        Shape ``(items,)``, float32 or wider.
    """
    wide = torch.promote_types(own.dtype, torch.float32)
    own, other = own.to(wide), other.to(wide)
    if not probabilities:
        return (own - other).square().sum(dim=-1)
    p = own.log_softmax(dim=-1)
    return (p.exp() * (p - other.log_softmax(dim=-1))).sum(dim=-1)


def squared_errors(rounded: RoundedWeights | QuantizedWeights) -> dict[str, dict[int, float]]:
    """Sum of squared rounding errors of each layer at each number of bits."""
    return layer_sums(channel_squared_errors(rounded), rounded.bits)


def channel_squared_errors(rounded: RoundedWeights | QuantizedWeights) -> dict[str, Tensor]:
    """Sum of squared rounding errors of each output channel: by layer, shape ``(channels, numbers of bits)``."""
    return {name: rounded.changes(name).float().square().sum(dim=2).T for name in rounded.sizes}


def fisher_errors(
    network: nn.Module,
    rounded: RoundedWeights | QuantizedWeights,
    batches: Iterable[Any],
    task: Task,
    *,
    samples: int = 64,
    seed: int = 0,
) -> dict[str, dict[int, float]]:
    """Second-order estimate of :class:`PlanLoss` for each layer alone: the sum of :func:`channel_fisher_errors`.

    What channels do to each other is left out: from so few samples it would be noise above all.

    Returns:
        By layer and number of bits, in nats.
    """
    found = channel_fisher_errors(network, rounded, batches, task, samples=samples, seed=seed)
    return layer_sums(found, rounded.bits)


def channel_fisher_errors(
    network: nn.Module,
    rounded: RoundedWeights | QuantizedWeights,
    batches: Iterable[Any],
    task: Task,
    *,
    samples: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    r"""Second-order estimate of :class:`PlanLoss` for each output channel alone.

    .. math:: \frac12 \Delta w^\top F \Delta w = \frac12 \mathbb{E}\left[(g^\top \Delta w)^2\right], \qquad
        F = \mathbb{E}[g g^\top]

    The Fisher information :math:`F` is the second derivative of the divergence; its gradients :math:`g` are of single
    samples, whose labels are drawn from the network's own prediction (compare HAWQ, Dong et al. 2019, which uses
    eigenvalues of the Hessian). One backward pass per sample, and no forward pass per number of bits.

    Args:
        network: The network.
        rounded: Its rounded weights; gradients are taken without rounding.
        batches: Batches of samples; only the first ``samples`` are used.
        task: How a batch is read; a classifier's or a language model's.
        samples: How many samples (tokens) have a gradient, positive.
        seed: Of the drawn labels.

    Returns:
        By layer, shape ``(channels, numbers of bits)``, in nats.

    Raises:
        ValueError: If the task has no probabilities, ``samples`` is not positive, or there are no batches.
    """
    changes = {name: rounded.changes(name).float() for name in rounded.sizes}
    total = {name: change.new_zeros(change.shape[1], len(rounded.bits)) for name, change in changes.items()}
    seen = 0
    for gradients in _sample_gradients(network, rounded, batches, task, samples, seed):
        for name, gradient in gradients.items():
            rows = rounded.rows(name, gradient).float()
            total[name] += torch.einsum("cw,bcw->cb", rows, changes[name]).square()
        seen += 1
    if seen == 0:
        raise ValueError("`batches` is empty: there is nothing to take gradients of.")
    return {name: squares / (2 * seen) for name, squares in total.items()}


def layer_sums(errors: Mapping[str, Tensor], bits: Sequence[int]) -> dict[str, dict[int, float]]:
    """The sums over channels of what is of shape ``(channels, numbers of bits)``."""
    return {name: dict(zip(bits, found.double().sum(dim=0).tolist(), strict=True)) for name, found in errors.items()}


def _sample_gradients(
    network: nn.Module,
    rounded: RoundedWeights | QuantizedWeights,
    batches: Iterable[Any],
    task: Task,
    samples: int,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the layers' weights of single samples, with labels drawn from the network's own prediction."""
    if not task.imitable:
        raise ValueError(f"`fisher` needs a task with probabilities, got {type(task).__name__}; use `kl`.")
    if not samples >= 1:
        raise ValueError(f"`samples` must be positive, got {samples}.")
    generator = torch.Generator().manual_seed(seed)
    parameters = rounded.parameters
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    seen = 0
    with inference(network), rounded.original(), torch.enable_grad():
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for batch in batches:
                logits = counted(task.run(network, batch), batch, task).float()[: samples - seen]
                labels = torch.multinomial(logits.detach().softmax(dim=-1).cpu(), 1, generator=generator)
                losses = -logits.log_softmax(dim=-1).gather(1, labels.to(logits.device)).squeeze(1)
                for row, loss in enumerate(losses):
                    found = torch.autograd.grad(
                        loss, list(parameters.values()), retain_graph=row + 1 < len(losses), allow_unused=True
                    )
                    yield {name: own for name, own in zip(parameters, found, strict=True) if own is not None}
                seen += len(losses)
                if seen >= samples:
                    break
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(flags[name])


def counted(outputs: Outputs, batch: Any, task: Task) -> Tensor:
    """Logits of the items that count, shape ``(n, C)``."""
    mask = task.mask(batch, outputs)
    logits = outputs.logits if mask is None else outputs.logits[mask]
    return logits.reshape(-1, logits.shape[-1])


__all__ = [
    "PlanLoss",
    "channel_fisher_errors",
    "channel_squared_errors",
    "counted",
    "divergence",
    "fisher_errors",
    "squared_errors",
]
