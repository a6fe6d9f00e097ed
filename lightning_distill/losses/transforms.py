"""From the student's features to the teacher's shape: trained with the student, left behind at export.

Features have the channels last, ``(B, *positions, d)``; a linear map of the channels is then a 1×1 convolution of a map
and the regressor of FitNets alike (Romero et al. 2015, section 2.2).
"""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.losses.lazy import Lazy, Shape


class LinearTransform(Lazy):
    """``W F + b`` from the student's width to the teacher's, at every position; starts (semi-)orthogonal.

    Args:
        bias: Whether there is a ``b``.

    Example:
        >>> import torch
        >>> transform = LinearTransform()
        >>> transform.build((8, 5, 3), (8, 5, 7))
        >>> transform(torch.ones(8, 5, 3)).shape
        torch.Size([8, 5, 7])
    """

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.bias = bias

    def make(self, *shapes: Shape) -> None:
        """A linear layer from the last number of the first shape to that of the second."""
        student, teacher = shapes
        self.linear = nn.Linear(student[-1], teacher[-1], bias=self.bias)
        nn.init.orthogonal_(self.linear.weight)
        if self.bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """``(..., d_student)`` to ``(..., d_teacher)``."""
        transformed: Tensor = self.linear(features)
        return transformed


class MLPTransform(Lazy):
    """``phi(W2 relu(W1 F + b1) + b2)`` at every position.

    Args:
        hidden: Width between the two layers; the larger of student's and teacher's by default.
        output: ``phi``: nothing (``"identity"``), ``"layernorm"`` or ``"gelu"``.

    Raises:
        ValueError: If ``hidden`` is not positive or ``output`` is unknown.
    """

    def __init__(
        self, hidden: int | None = None, output: Literal["identity", "layernorm", "gelu"] = "identity"
    ) -> None:
        super().__init__()
        if hidden is not None and not hidden >= 1:
            raise ValueError(f"`hidden` must be positive, got {hidden}.")
        if output not in ("identity", "layernorm", "gelu"):
            raise ValueError(f"`output` must be 'identity', 'layernorm' or 'gelu', got {output!r}.")
        self.hidden = hidden
        self.output = output

    def make(self, *shapes: Shape) -> None:
        """Two linear layers between the last numbers of the two shapes."""
        student, teacher = (shape[-1] for shape in shapes)
        hidden = self.hidden or max(student, teacher)
        outputs = {"identity": nn.Identity(), "layernorm": nn.LayerNorm(teacher), "gelu": nn.GELU()}
        self.layers = nn.Sequential(
            nn.Linear(student, hidden), nn.ReLU(), nn.Linear(hidden, teacher), outputs[self.output]
        )

    def forward(self, features: Tensor) -> Tensor:
        """``(..., d_student)`` to ``(..., d_teacher)``."""
        transformed: Tensor = self.layers(features)
        return transformed


TRANSFORMS: dict[str, Any] = {"linear": LinearTransform, "mlp": MLPTransform, "identity": nn.Identity}
"""Transforms by the names that terms know them by."""


def resize(features: Tensor, size: tuple[int, ...], mode: Literal["auto", "pool", "interpolate"] = "auto") -> Tensor:
    """Bring a map to another number of positions.

    Args:
        features: Shape ``(B, *positions, d)`` with one to three dimensions of positions.
        size: Positions of the result.
        mode: ``"pool"`` averages over bins that cover the map (adaptive average pooling; repeats values where the
            result is larger), ``"interpolate"`` is linear between the centres, ``"auto"`` pools where the result is
            not larger in any direction.

    Returns:
        Shape ``(B, *size, d)``; the very same tensor if nothing is to be done.

    Raises:
        ValueError: If the number of dimensions differs, or ``mode`` is unknown.
    """
    positions = features.shape[1:-1]
    if len(positions) != len(size) or not 1 <= len(size) <= 3:
        raise ValueError(
            f"Features with positions {tuple(positions)} cannot be brought to positions {tuple(size)}. Tap layers "
            "whose outputs have as many dimensions, or pool one of them."
        )
    if mode not in ("auto", "pool", "interpolate"):
        raise ValueError(f"`mode` must be 'auto', 'pool' or 'interpolate', got {mode!r}.")
    if tuple(positions) == tuple(size):
        return features
    if mode == "auto":
        mode = "pool" if all(new <= old for new, old in zip(size, positions, strict=True)) else "interpolate"
    channels_first = features.movedim(-1, 1)
    if mode == "pool":
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[len(size) - 1]
        resized = pool(channels_first, size if len(size) > 1 else size[0])  # type: ignore[arg-type]
    else:
        kind = ("linear", "bilinear", "trilinear")[len(size) - 1]
        resized = F.interpolate(channels_first, size=list(size), mode=kind, align_corners=False)
    return resized.movedim(1, -1)


def channels_last(features: Tensor, channel_dim: int | None = None) -> Tensor:
    """A view of ``features`` as ``(B, *positions, d)``.

    Args:
        features: At least two-dimensional.
        channel_dim: Where the channels are; by default dimension 1 of images and volumes (4 and 5 dimensions), else
            the last.
    """
    if channel_dim is None:
        channel_dim = 1 if features.ndim in (4, 5) else -1
    return features.movedim(channel_dim, -1)
