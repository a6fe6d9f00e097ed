"""Residual networks of which a random part is left out in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

Mode = Literal["batch", "row"]
Scale = Literal["train", "test"]


def survival_probabilities(blocks: int, last: float = 0.5) -> list[float]:
    """Probability that a residual block is kept, ``1 - l / L * (1 - last)`` for ``l = 1 … L``: deep ones go first.

    Huang et al. (2016), section 3, https://arxiv.org/abs/1603.09382. ``last`` is the paper's ``p_L``, that of the
    *deepest* block; the input, ``l = 0``, always survives. On average ``L - (1 - last) * (L + 1) / 2`` blocks are
    active.

    Args:
        blocks: Number of blocks ``L``, positive.
        last: Probability of the last block, in (0, 1].

    Raises:
        ValueError: If ``blocks`` is not positive or ``last`` is outside (0, 1].

    Example:
        >>> survival_probabilities(4)
        [0.875, 0.75, 0.625, 0.5]
    """
    if not blocks > 0:
        raise ValueError(f"`blocks` must be positive, got {blocks}.")
    _check_survival("last", last)
    return [1 - layer / blocks * (1 - last) for layer in range(1, blocks + 1)]


class StochasticDepth(nn.Module):
    """A residual block, ``x + F(x)``, that in training lets ``x`` pass unchanged with probability ``1 - survival``.

    In eval mode, and with ``survival=1``, it is the block itself. A block that is left out has gradients of zero, not
    none: optimizers and DDP see the same parameters in every step.

    Args:
        block: The residual block *with* its shortcut; its output has the shape of its input. Of a tuple, as
            transformers blocks return it, the first tensor is meant.
        survival: Probability that it is kept, in (0, 1].
        mode: ``"row"`` draws for each sample, and always computes the block. ``"batch"`` draws once for all samples,
            and saves the computation where the block is left out.
        scale: ``"train"`` divides ``F`` by ``survival`` where it is kept, so that nothing has to be done later.
            ``"test"`` leaves it as it is, and multiplies by ``survival`` in eval mode, as the paper does.

    Raises:
        ValueError: If an argument is outside its range; in a forward pass, if the block changes the shape.
    """

    def __init__(self, block: nn.Module, survival: float = 0.5, *, mode: Mode = "row", scale: Scale = "train") -> None:
        super().__init__()
        _check_survival("survival", survival)
        if mode not in ("batch", "row"):
            raise ValueError(f"`mode` must be 'batch' or 'row', got {mode!r}.")
        if scale not in ("train", "test"):
            raise ValueError(f"`scale` must be 'train' or 'test', got {scale!r}.")
        self.block = block
        self.survival = survival
        self.mode = mode
        self.scale = scale

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The block, the block with its residual scaled, or ``x``."""
        if self.survival == 1 or (not self.training and self.scale == "train"):
            return self.block(x, *args, **kwargs)
        if not self.training:
            return self._scaled(x, self.block(x, *args, **kwargs), self.survival)
        kept = 1 / self.survival if self.scale == "train" else 1.0
        if self.mode == "row":
            draw = torch.rand(len(x), device=x.device) < self.survival
            factor = draw.reshape(-1, *(1 for _ in x.shape[1:])).to(x.dtype) * kept
            return self._scaled(x, self.block(x, *args, **kwargs), factor)
        if float(torch.rand(())) < self.survival:  # on the CPU: the device is not waited for
            said = self.block(x, *args, **kwargs)
            return said if kept == 1 else self._scaled(x, said, kept)
        return x + sum(parameter.flatten()[:1].sum() * 0 for parameter in self.block.parameters())

    def _scaled(self, x: Tensor, said: Any, factor: Tensor | float) -> Any:
        """``x + factor * F(x)``, in whatever ``said`` is."""
        y = said[0] if isinstance(said, (tuple, list)) else said
        if not isinstance(y, Tensor) or y.shape != x.shape:
            shape = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"StochasticDepth needs a residual block whose output has the shape of its input; {_name(self.block)} "
                f"made {shape} of {tuple(x.shape)}. Leave blocks that change the width or the resolution unwrapped."
            )
        y = x + factor * (y - x)
        return (y, *said[1:]) if isinstance(said, (tuple, list)) else y


def add_stochastic_depth(
    network: nn.Module, blocks: Sequence[str], *, last: float = 0.5, mode: Mode = "row", scale: Scale = "train"
) -> nn.Module:
    """Wrap residual blocks of ``network``, in place, with :func:`survival_probabilities` that fall with the depth.

    Args:
        network: Any module.
        blocks: Dotted paths of the blocks, from the first to the last.
        last: Probability that the last one is kept, in (0, 1].
        mode: See :class:`StochasticDepth`.
        scale: See :class:`StochasticDepth`.

    Returns:
        ``network``.

    Raises:
        ValueError: If there is no block of a name, one is named twice or wrapped already, or an argument is outside its
            range.

    Example:
        >>> network = nn.Sequential(nn.Identity(), nn.Identity())
        >>> [block.survival for block in add_stochastic_depth(network, ["0", "1"])]
        [0.75, 0.5]
    """
    probabilities = survival_probabilities(len(blocks), last) if len(blocks) > 0 else []
    if not probabilities:
        raise ValueError("`blocks` must name at least one residual block, got none.")
    modules = dict(network.named_modules())
    for name in blocks:
        if not name or name not in modules:
            known = [found for found in modules if found]
            raise ValueError(f"`blocks` names {name!r}, which {_name(network)} does not have. It has {known[:8]}.")
        if isinstance(modules[name], StochasticDepth) or list(blocks).count(name) > 1:
            raise ValueError(
                f"`blocks` names {name!r}, which is wrapped already, or named twice. Name each block once."
            )
    for name, survival in zip(blocks, probabilities, strict=True):
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, StochasticDepth(modules[name], survival, mode=mode, scale=scale))
    return network


def remove_stochastic_depth(network: nn.Module) -> nn.Module:
    """Take the wrappers out again, in place: the network that was wrapped, with its weights as they are now.

    Returns:
        ``network``.

    Raises:
        ValueError: If a wrapper scales in eval mode (``scale="test"``), which the bare block would not.
    """
    for name, module in reversed(list(network.named_modules())):  # inner ones first: names change
        if isinstance(module, StochasticDepth):
            if module.scale == "test" and module.survival < 1:
                raise ValueError(
                    f"The block {name!r} is scaled in eval mode (`scale='test'`), which would be lost with its "
                    "wrapper. Use `scale='train'`, or keep the wrappers."
                )
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.block)
    return network


def _name(module: nn.Module) -> str:
    return type(module).__name__


def _check_survival(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"`{name}`, the probability to be kept, must be in (0, 1], got {value}.")
