"""What the input of a sample looks like, in four numbers: enough to notice that a cache is of other inputs."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from lightning_distill.teachers.cache.spec import SIGNATURE

TOLERANCE = 0.02
"""Relative difference that casting to bfloat16 or another device may cause, with room to spare."""


def input_signature(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Norm of each sample's input and random projections of its direction.

    Other samples, other transforms or another tokenizer change it; a cast to half precision or, with ``mask``,
    padding does not. Chance lets one in about 10^5 wrong samples pass, and a whole batch of them never. Nearly equal
    inputs (a little noise, one token among hundreds) may count as equal.

    Args:
        inputs: Numbers, or integers such as token ids, whose values are scrambled first; shape ``(B, ...)``.
        mask: Which tokens are real, shape ``(B, T)`` as that of ``inputs``; padding on either side is left out.

    Returns:
        Shape ``(B, 4)``, float32, on the device of ``inputs``.

    Example:
        >>> tokens = torch.tensor([[5, 7, 0, 0], [0, 0, 5, 7]])
        >>> one, other = input_signature(tokens, mask=tokens > 0)
        >>> torch.equal(one, other)
        True
    """
    values = _values(inputs).reshape(len(inputs), -1)
    signs = _signs(values.shape[1]).to(inputs.device)
    if mask is not None and mask.shape == inputs.shape:
        real = mask != 0
        place = (real.cumsum(dim=1) - 1).clamp_min(0)
        values = values * real
        norm = values.norm(dim=1, keepdim=True)
        projections = (values.unsqueeze(-1) * signs[place]).sum(dim=1) / norm.clamp_min(1e-30)
    else:
        norm = values.norm(dim=1, keepdim=True)
        projections = (values / norm.clamp_min(1e-30)) @ signs
    return torch.cat([norm, projections.to(norm.dtype)], dim=1)


def same_input(stored: Tensor, found: Tensor) -> Tensor:
    """Which samples' inputs agree with what was stored, boolean, shape ``(B,)``; one that is not known agrees.

    Args:
        stored: Signatures, shape ``(B, 4)``; NaN where they are not known.
        found: Signatures of the same samples now.
    """
    limit = torch.full_like(stored, TOLERANCE)
    limit[:, 0] *= stored[:, 0]
    close = ((stored - found).abs() <= limit).all(dim=1)  # NaN in what was found is no agreement
    return close | stored.isnan().all(dim=1)


def _values(inputs: Tensor) -> Tensor:
    if inputs.is_floating_point():
        return inputs.float()
    # Fibonacci hashing: neighbouring ids become unrelated numbers in [-1, 1).
    return (inputs.long() * 2654435761).remainder(2**32).float() / 2**31 - 1


@functools.lru_cache(maxsize=8)
def _signs(size: int) -> Tensor:
    """Random signs, shape ``(size, 3)``, the same for ever: NumPy keeps the bits of its generators over versions."""
    bits = np.random.PCG64(0).random_raw(-(-size * (SIGNATURE - 1) // 64))
    signs = np.unpackbits(bits.astype("<u8").view(np.uint8))[: size * (SIGNATURE - 1)]
    return torch.from_numpy(signs.astype(np.float32) * 2 - 1).reshape(size, SIGNATURE - 1)
