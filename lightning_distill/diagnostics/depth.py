"""What reaches the layers of a deep network, and how much the random parts of one agree with the whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.diagnostics.estimates import Estimate, bootstrap_mean
from lightning_distill.losses.soft_targets import kl_divergence
from lightning_distill.modes import inference
from lightning_distill.stochastic_depth import StochasticDepth
from lightning_distill.tasks import Classification, Task


@dataclass(frozen=True)
class GradientFlow:
    """How large the gradient of a loss is in each layer.

    Attributes:
        norms: Euclidean norm of the gradient of all parameters of a layer, by layer, from the first to the last.
    """

    norms: Mapping[str, float]

    @property
    def ratio(self) -> float:
        """First over last layer: near 0 where the gradient vanishes on its way back; infinite if the last has none."""
        first, *_, last = self.norms.values()
        return first / last if last > 0 else math.inf

    def __str__(self) -> str:
        largest = max(self.norms.values(), default=0.0)
        width = max(map(len, self.norms), default=0)
        scale = largest if largest > 0 else 1.0
        lines = [f"{name:{width}}  {norm:9.2e}  {'#' * round(40 * norm / scale)}" for name, norm in self.norms.items()]
        return "\n".join([*lines, f"first / last layer: {self.ratio:.2e}"])


def gradient_flow_profile(loss: Tensor, layers: Mapping[str, nn.Module | Iterable[nn.Parameter]]) -> GradientFlow:
    """Gradient norm of ``loss`` in each layer: whether auxiliary heads let more of it reach the first ones.

    Compare the profile of the network's own loss with that of the loss with heads, of the same batch and weights.
    Nothing is written to ``.grad``, and the graph stays for a backward pass.

    Args:
        loss: Scalar with a graph.
        layers: Layers, or parameters of layers, by name, from the first to the last; at least two.

    Raises:
        ValueError: If ``loss`` is no scalar or has no graph, there are fewer than two layers, or one has no parameter.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
        >>> profile = gradient_flow_profile(network(torch.ones(4, 2)).sum(), {"first": network[0], "last": network[2]})
        >>> list(profile.norms)
        ['first', 'last']
    """
    if loss.ndim != 0 or not loss.requires_grad:
        raise ValueError(
            f"`loss` must be a scalar with a graph, got shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}."
        )
    if len(layers) < 2:
        raise ValueError(f"`layers` must be at least two, from the first to the last, got {list(layers)}.")
    groups = {
        name: [p for p in (layer.parameters() if isinstance(layer, nn.Module) else layer) if p.requires_grad]
        for name, layer in layers.items()
    }
    if empty := [name for name, parameters in groups.items() if not parameters]:
        raise ValueError(f"`layers` {empty} have no trainable parameter, so no gradient. Leave them out.")
    norms = {}
    for name, parameters in groups.items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    return GradientFlow(norms)


@dataclass(frozen=True)
class SubnetAgreement:
    """How close random sub-networks are to the whole network on a batch.

    Attributes:
        divergence: KL(whole || sub-network) in nats, mean over the items; the interval is over the sub-networks.
        agreement: Share of items on which both decide alike.
    """

    divergence: Estimate
    agreement: Estimate


def subnet_agreement(
    network: nn.Module,
    batches: Sequence[Any],
    *,
    subnets: int = 20,
    task: Task | None = None,
    generator: torch.Generator | None = None,
) -> SubnetAgreement:
    """Draw sub-networks of one with :class:`~lightning_distill.stochastic_depth.StochasticDepth`, and compare them.

    Measure before and after a training: self-distillation should bring the sub-networks closer to the whole.

    Args:
        network: With wrapped blocks. Everything else is in eval mode while it is measured. A block is drawn for all
            items of a batch at once, and its residual not rescaled for it: each draw is one sub-network.
        batches: One or more.
        subnets: How many are drawn, positive.
        task: How a batch is read. Default :class:`~lightning_distill.tasks.Classification`.
        generator: Source of randomness, on the CPU; by default one with a fixed seed.

    Raises:
        ValueError: If the network has no wrapped block, there are no batches, or ``subnets`` is not positive.
    """
    task = Classification() if task is None else task
    blocks = [module for module in network.modules() if isinstance(module, StochasticDepth)]
    if not blocks or len(batches) == 0 or not subnets >= 1:
        raise ValueError(
            f"`network` must have blocks in `StochasticDepth`, `batches` and `subnets` must be at least one, got "
            f"{len(blocks)}, {len(batches)} and {subnets}."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    divergences, agreements = [], []
    with inference(network):
        whole = [task.run(network, batch).logits.double() for batch in batches]
        for _ in range(subnets):
            kept = [bool(torch.rand((), generator=generator) < block.survival) for block in blocks]
            left_out = [block for block, keep in zip(blocks, kept, strict=True) if not keep]
            handles = [block.register_forward_hook(_pass_through) for block in left_out]
            try:
                part = [task.run(network, batch).logits.double() for batch in batches]
            finally:
                for handle in handles:
                    handle.remove()
            pairs = list(zip(part, whole, strict=True))
            divergence = torch.cat([kl_divergence(sub, full).flatten() for sub, full in pairs])
            alike = torch.cat([(sub.argmax(-1) == full.argmax(-1)).double().flatten() for sub, full in pairs])
            divergences.append(divergence.mean().item())
            agreements.append(alike.mean().item())
    return SubnetAgreement(bootstrap_mean(divergences), bootstrap_mean(agreements))


def _pass_through(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """What a block that is left out gives: its input."""
    return (inputs[0], *output[1:]) if isinstance(output, (tuple, list)) else inputs[0]
