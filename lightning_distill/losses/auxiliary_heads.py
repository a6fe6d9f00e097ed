"""Small classifiers on the inner layers of a network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.losses.lazy import Lazy, Shape
from lightning_distill.losses.transforms import channels_last
from lightning_distill.outputs import Step, StepRule

Tier = Literal["linear", "mlp2", "mlp3"]
HeadKind = Literal["linear", "mlp2", "mlp3", "tiered", "proportional", "inverse", "shared"]
Pool = Literal["mean", "flatten"]


def head_tier(layer: int, depth: int) -> Tier:
    """How many layers a head on ``layer`` of ``depth`` gets: one in the first third, two in the second, three after.

    Args:
        layer: Number of the layer, counted from 1.
        depth: Number of layers of the whole network.

    Raises:
        ValueError: If ``layer`` is not from 1 to ``depth``.

    Example:
        >>> [head_tier(layer, 12) for layer in (4, 5, 9)]
        ['linear', 'mlp2', 'mlp3']
    """
    _check_layer(layer, depth)
    if 3 * layer <= depth:
        return "linear"
    return "mlp2" if 3 * layer <= 2 * depth else "mlp3"


def head_width(
    layer: int,
    depth: int,
    *,
    base: int = 256,
    minimum: int = 16,
    mode: Literal["proportional", "inverse"] = "proportional",
) -> int:
    """Hidden units of a head on ``layer`` of ``depth``, growing with the depth, or, mirrored, shrinking.

    Which of the two is better is contested: Be Your Own Teacher (Zhang et al. 2019, https://arxiv.org/abs/1905.08094)
    gives the *shallow* heads more to do, as their features are less mature.

    Args:
        layer: Number of the layer, counted from 1.
        depth: Number of layers of the whole network.
        base: Units of the largest head.
        minimum: Units of the smallest, at most ``base``.
        mode: ``"proportional"`` to ``layer / depth``, or ``"inverse"``, to ``(depth + 1 - layer) / depth``.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> [head_width(layer, 12) for layer in (3, 12)], [head_width(layer, 12, mode="inverse") for layer in (1, 10)]
        ([64, 256], [256, 64])
    """
    _check_layer(layer, depth)
    if not 0 < minimum <= base:
        raise ValueError(f"`minimum` must be positive and at most `base`, got {minimum} and {base}.")
    if mode not in ("proportional", "inverse"):
        raise ValueError(f"`mode` must be 'proportional' or 'inverse', got {mode!r}.")
    level = layer if mode == "proportional" else depth + 1 - layer
    return max(base * level // depth, minimum)


def auxiliary_head(
    width: int, classes: int, *, tier: Tier = "linear", hidden: int = 64, dropout: float = 0.1
) -> nn.Sequential:
    """A classifier of ``width`` features: linear, or with one or two hidden layers, each with ReLU and dropout.

    Args:
        width: Number of features.
        classes: Number of outputs.
        tier: ``"linear"``, ``"mlp2"`` or ``"mlp3"``, the number of linear layers.
        hidden: Units of each hidden layer.
        dropout: Share of hidden units that are dropped in training, in [0, 1).

    Raises:
        ValueError: If ``tier`` is unknown.

    Example:
        >>> sum(parameter.numel() for parameter in auxiliary_head(64, 10, tier="mlp2").parameters())
        4810
    """
    layers = {"linear": 1, "mlp2": 2, "mlp3": 3}
    if tier not in layers:
        raise ValueError(f"`tier` must be one of {', '.join(layers)}, got {tier!r}.")
    sizes = [width, *[hidden] * (layers[tier] - 1)]
    parts: list[nn.Module] = []
    for i in range(1, len(sizes)):
        parts += [nn.Linear(sizes[i - 1], sizes[i]), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*parts, nn.Linear(sizes[-1], classes))


class SharedHead(nn.Module):
    """``W_shared phi(h) + b``: a head with its own first layer ``phi`` and bias, and a classifier that all share.

    Args:
        width: Number of features.
        shared: Linear layer without bias, the same object in all heads.
    """

    def __init__(self, width: int, shared: nn.Linear) -> None:
        super().__init__()
        self.phi = nn.Linear(width, shared.in_features)
        self.bias = nn.Parameter(torch.zeros(shared.out_features))
        self.shared = shared

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of features ``(n, width)``."""
        logits: Tensor = self.shared(torch.relu(self.phi(features))) + self.bias
        return logits


class AuxiliaryHeads(Lazy):
    """Classifiers on inner layers of a network, one per tap; made for the widths of a first batch.

    A head reads the mean over the positions of a map or a sequence (without padding); for language models, where an
    item is a token, it reads each token. The heads are trained with the terms that hold them, and share nothing with
    the network.

    Args:
        taps: Names of the activations, in the order in which the network computes them; see
            :class:`~lightning_distill.taps.Taps`.
        kind: ``"linear"``, ``"mlp2"`` or ``"mlp3"`` for all; ``"tiered"`` after :func:`head_tier`;
            ``"proportional"`` or ``"inverse"`` for two layers of :func:`head_width` units; ``"shared"`` for heads with
            one classifier in common.
        weights: Weight of each head, or one number for all; not negative.
        schedule: Factor of all weights as a function of the step, such as
            :class:`~lightning_distill.weighting.LinearDecay`.
        layers: Number of each tapped layer, counted from 1, for the kinds that depend on it. Default ``1, 2, …``.
        depth: Number of layers of the network. Default: one more than the last of ``layers``.
        hidden: Hidden units of a head; for ``"proportional"`` and ``"inverse"`` those of the largest, and the smallest
            has at least 16.
        dropout: In the hidden layers, in [0, 1).
        pool: ``"mean"`` over the positions, or ``"flatten"``, all of them side by side, where their number is fixed.
        channel_dim: Dimension of the channels; by default 1 for tensors of 4 and 5 dimensions, else the last. 1-d
            convolutions need ``1``.

    Attributes:
        weights: The present weight of each head before the schedule; callbacks turn it.

    Raises:
        ValueError: If a value is outside its range, or numbers do not match; by :meth:`build_for`, if a tapped
            activation is nothing that a head can read, or the taps are out of order.
    """

    def __init__(
        self,
        taps: Sequence[str],
        kind: HeadKind = "tiered",
        *,
        weights: float | Sequence[float] = 0.3,
        schedule: StepRule | None = None,
        layers: Sequence[int] | None = None,
        depth: int | None = None,
        hidden: int = 64,
        dropout: float = 0.1,
        pool: Pool = "mean",
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(taps, str) or len(taps) == 0 or len(set(taps)) < len(taps):
            raise ValueError(f"`taps` must name at least one layer, and each once, got {taps!r}.")
        kinds = ("linear", "mlp2", "mlp3", "tiered", "proportional", "inverse", "shared")
        for name, value, known in (("kind", kind, kinds), ("pool", pool, ("mean", "flatten"))):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
        if not hidden >= 1:
            raise ValueError(f"`hidden` must be positive, got {hidden}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
        self.taps = tuple(taps)
        self.kind = kind
        self.weights = _checked_weights(weights, self.taps)
        self.schedule = schedule
        self.layers = _checked_layers(layers, self.taps)
        self.depth = self.layers[-1] + 1 if depth is None else depth
        _check_layer(self.layers[-1], self.depth)
        self.hidden = hidden
        self.dropout = dropout
        self.pool = pool
        self.channel_dim = channel_dim
        self.heads = nn.ModuleList()

    def build_for(self, step: Step) -> None:
        """Make the heads for the activations and the number of classes of ``step``."""
        computed = tuple(name for name in step.student.features if name in self.taps)
        if set(computed) == set(self.taps) and computed != self.taps:
            raise ValueError(
                f"`taps` are out of order: the network computes them as {list(computed)}, got {list(self.taps)}. A "
                "head learns from deeper ones, and exits are tried one after the other: name them in that order."
            )
        samples = len(step.positions) if step.token_items and step.positions is not None else step.student.item_shape[0]
        read = [self.read(step.student.features[name], name, step.positions, step.token_items) for name in self.taps]
        for name, features in zip(self.taps, read, strict=True):
            if not step.token_items and len(features) != samples:
                raise ValueError(
                    f"The layer {name!r} has {len(features)} rows for {samples} samples, so a head on it has no usable "
                    "shape. Tap a layer whose output begins with the batch."
                )
        self.build(*(features.shape for features in read), (samples, step.student.logits.shape[-1]))

    def make(self, *shapes: Shape) -> None:
        """One head for each of the shapes ``(B, width)`` but the last, which is ``(B, classes)``."""
        *features, (_, classes) = shapes
        shared = nn.Linear(self.hidden, classes, bias=False) if self.kind == "shared" else None
        for (_, width), layer in zip(features, self.layers, strict=True):
            self.heads.append(SharedHead(width, shared) if shared is not None else self._head(width, classes, layer))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Logits ``(n, classes)`` of each head, of features ``(n, width)`` as :meth:`read` gives them."""
        return [head(feature) for head, feature in zip(self.heads, features, strict=True)]

    def logits(self, step: Step) -> list[Tensor]:
        """What each head says about ``step``, of the item shape plus classes; computed once per step."""
        key = f"auxiliary_heads_{id(self)}"
        if key not in step.extras:
            read = (
                self.read(step.student.features[name], name, step.positions, step.token_items) for name in self.taps
            )
            step.extras[key] = self(list(read))
        found: list[Tensor] = step.extras[key]
        return found

    def settings(self) -> dict[str, Any]:
        """The arguments that make such heads again, plain values; without weights and schedule, which train them."""
        names = ("kind", "layers", "depth", "hidden", "dropout", "pool", "channel_dim")
        return {"taps": list(self.taps)} | {name: getattr(self, name) for name in names}

    def weights_at(self, step: Step) -> list[float]:
        """Weight of each head at ``step``: ``weights`` times the schedule."""
        factor = 1.0 if self.schedule is None else float(self.schedule(step))
        return [weight * factor for weight in self.weights]

    def read(self, features: Tensor, tap: str, positions: Tensor | None = None, tokens: bool = False) -> Tensor:
        """What the head on ``tap`` sees of an activation: ``(B, width)``, or ``(n, width)`` for ``n`` tokens.

        Args:
            features: Shape ``(B, width)``, or with positions, channels where ``channel_dim`` says.
            tap: Its name, for the message of an error.
            positions: Which positions of a sequence count, boolean, ``(B, T)``.
            tokens: Whether an item is one of those positions.

        Raises:
            ValueError: If the activation has no usable shape.
        """
        if features.ndim < 2 or not features.is_floating_point():
            raise ValueError(
                f"A head on {tap!r} has no usable shape: the layer gives {features.dtype} of shape "
                f"{tuple(features.shape)}, expected real numbers (B, width), (B, positions, width) or a map. Tap "
                "another layer."
            )
        last = channels_last(features, self.channel_dim)
        matches = positions is not None and positions.shape == last.shape[:-1]
        if tokens:
            if positions is None or not matches:
                raise ValueError(
                    f"A head on {tap!r} has no usable shape: it needs a value for each token, (B, T, width), but the "
                    f"layer gives {tuple(features.shape)}. Tap a layer that keeps the positions."
                )
            return last[positions]
        if last.ndim == 2:
            return last
        if self.pool == "flatten":
            return last.flatten(1)
        if positions is None or not matches:
            return last.flatten(1, -2).mean(dim=1)
        counted = positions.sum(dim=1, keepdim=True).clamp_min(1)
        return last.where(positions.unsqueeze(-1), 0).sum(dim=1) / counted

    def _head(self, width: int, classes: int, layer: int) -> nn.Module:
        if self.kind == "proportional" or self.kind == "inverse":
            minimum = min(16, self.hidden)
            hidden = head_width(layer, self.depth, base=self.hidden, minimum=minimum, mode=self.kind)
            return auxiliary_head(width, classes, tier="mlp2", hidden=hidden, dropout=self.dropout)
        tier: Tier = head_tier(layer, self.depth) if self.kind == "tiered" else self.kind  # type: ignore[assignment]
        return auxiliary_head(width, classes, tier=tier, hidden=self.hidden, dropout=self.dropout)


def _check_layer(layer: int, depth: int) -> None:
    if not 1 <= layer <= depth:
        raise ValueError(f"`layer` must be from 1 to the depth of the network, {depth}, got {layer}.")


def _checked_weights(weights: float | Sequence[float], taps: Sequence[str]) -> list[float]:
    listed = [float(weights)] * len(taps) if isinstance(weights, (int, float)) else [float(w) for w in weights]
    if len(listed) != len(taps):
        raise ValueError(f"`weights` must have one number for each of the {len(taps)} heads, got {len(listed)}.")
    for tap, weight in zip(taps, listed, strict=True):
        if not weight >= 0:  # also rejects NaN
            raise ValueError(f"The weight of the head on {tap!r} must not be negative, got {weight}.")
    return listed


def _checked_layers(layers: Sequence[int] | None, taps: Sequence[str]) -> tuple[int, ...]:
    listed = tuple(range(1, len(taps) + 1)) if layers is None else tuple(layers)
    if len(listed) != len(taps) or any(a >= b for a, b in pairwise(listed)) or listed[0] < 1:
        raise ValueError(
            f"`layers` must be {len(taps)} rising numbers from 1 on, one for each tap, got {list(listed)}."
        )
    return listed
