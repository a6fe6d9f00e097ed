"""Layers of a network that are drawn to deeper layers of the same network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from typing import Literal

from torch import Tensor, nn

from lightning_distill.losses.distances import mse
from lightning_distill.losses.items import per_item
from lightning_distill.losses.lazy import Lazy
from lightning_distill.losses.term import Term
from lightning_distill.losses.transforms import TRANSFORMS, channels_last, resize
from lightning_distill.outputs import Step

Which = Literal["all", "adjacent", "to_last"]


def alignment_pairs(layers: int, which: Which = "to_last") -> list[tuple[int, int]]:
    """Pairs ``(i, j)``, ``i < j``, of layers counted from 0, the deeper of which teaches.

    Args:
        layers: Number of layers, at least 2.
        which: ``"all"`` of them, ``"adjacent"`` ones, or each ``"to_last"``.

    Raises:
        ValueError: If there are fewer than two layers or ``which`` is unknown.

    Example:
        >>> alignment_pairs(3, "all")
        [(0, 1), (0, 2), (1, 2)]
    """
    if not layers >= 2:
        raise ValueError(f"`layers` must be at least 2, got {layers}.")
    if which == "all":
        return list(combinations(range(layers), 2))
    if which == "adjacent":
        return list(pairwise(range(layers)))
    if which == "to_last":
        return [(layer, layers - 1) for layer in range(layers - 1)]
    raise ValueError(f"`which` must be 'all', 'adjacent' or 'to_last', got {which!r}.")


def hierarchical_pairs(layers: int) -> list[tuple[int, int]]:
    """Pairs ``(l, 2 l)`` of layers counted from 1, for ``l`` up to half of ``layers``: 24 teaches 12, 12 teaches 6 …

    Raises:
        ValueError: If there are fewer than two layers.

    Example:
        >>> hierarchical_pairs(6)
        [(1, 2), (2, 4), (3, 6)]
    """
    if not layers >= 2:
        raise ValueError(f"`layers` must be at least 2, got {layers}.")
    return [(layer, 2 * layer) for layer in range(1, layers // 2 + 1)]


class PairedLayers(Term):
    """``sum(w * ||P(h_i) - h_j||² / d)`` over pairs of layers, the deeper one, ``j``, detached.

    The square is divided by the width ``d``, so that a weight means the same for layers of all widths. Maps of other
    sizes are brought to the deeper layer's first. Padding does not count. ``P`` stands on the side that learns: on the
    teaching side it could bring the loss to zero by mapping everything to nothing.

    Args:
        pairs: Tap of the layer that learns and tap of the deeper one that teaches it.
        weights: Of each pair, not negative; 1 each by default.
        projection: ``"linear"`` or ``"mlp"``, trained with the student and left behind at export, or ``"identity"``.
        channel_dim: Dimension of the channels; by default 1 for tensors of 4 and 5 dimensions, else the last. 1-d
            convolutions need ``1``.

    Raises:
        ValueError: If there are no pairs, the weights are not as many or negative, or ``projection`` is unknown.
    """

    needs_teacher = False

    def __init__(
        self,
        pairs: Sequence[tuple[str, str]],
        weights: Sequence[float] | None = None,
        projection: Literal["linear", "mlp", "identity"] = "linear",
        channel_dim: int | None = None,
    ) -> None:
        super().__init__()
        if len(pairs) == 0:
            raise ValueError("`pairs` must hold at least one pair of layers, got none.")
        if projection not in TRANSFORMS:
            raise ValueError(f"`projection` must be one of {', '.join(TRANSFORMS)}, got {projection!r}.")
        self.pairs = tuple((shallow, deep) for shallow, deep in pairs)
        self.student_taps = tuple(dict.fromkeys(name for pair in self.pairs for name in pair))
        self.weights = [1.0] * len(pairs) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(pairs) or not all(weight >= 0 for weight in self.weights):
            raise ValueError(
                f"`weights` must be one number for each of the {len(pairs)} pairs, not negative, got {self.weights}."
            )
        self.channel_dim = channel_dim
        self.projections = nn.ModuleList(TRANSFORMS[projection]() for _ in self.pairs)

    def build(self, step: Step) -> None:
        """Make the projections for the widths of the layers."""
        for pair, projection in zip(self.pairs, self.projections, strict=True):
            shallow, deep = self._features(pair, step)
            if isinstance(projection, Lazy):
                projection.build((0, shallow.shape[-1]), (0, deep.shape[-1]))

    def forward(self, step: Step) -> Tensor:
        """Value of each item."""
        values = []
        for pair, weight, projection in zip(self.pairs, self.weights, self.projections, strict=True):
            shallow, deep = self._features(pair, step)
            values.append(weight * per_item(mse(projection(shallow), deep), step))
        total: Tensor = sum(values[1:], start=values[0])
        return total

    def _features(self, pair: tuple[str, str], step: Step) -> tuple[Tensor, Tensor]:
        """Both layers, channels last, with the same positions."""
        shallow, deep = (channels_last(step.student.features[name], self.channel_dim) for name in pair)
        if shallow.shape[:-1] != deep.shape[:-1]:
            shallow = resize(shallow, tuple(deep.shape[1:-1]))
        return shallow, deep.detach()


class FeatureAlignment(PairedLayers):
    """Draw the features of shallow layers to those of deeper ones.

    Zhang et al. (2019), Be Your Own Teacher, section 3.2, https://arxiv.org/abs/1905.08094.

    Args:
        taps: Names of the layers, from the shallowest to the deepest; at least two.
        which: Who teaches whom; see :func:`alignment_pairs`. ``"all"`` needs a projection for each pair of layers.
        weights: See :class:`PairedLayers`, as for the arguments below; in the order of :func:`alignment_pairs`.
        projection: See :class:`PairedLayers`.
        channel_dim: See :class:`PairedLayers`.

    Raises:
        ValueError: If there are fewer than two taps, and as :class:`PairedLayers`.
    """

    def __init__(
        self,
        taps: Sequence[str],
        which: Which = "to_last",
        weights: Sequence[float] | None = None,
        projection: Literal["linear", "mlp", "identity"] = "linear",
        channel_dim: int | None = None,
    ) -> None:
        pairs = [(taps[i], taps[j]) for i, j in alignment_pairs(len(taps), which)]
        super().__init__(pairs, weights, projection, channel_dim)


class HierarchicalSelfKD(PairedLayers):
    """Layer ``2 l`` teaches layer ``l`` of the same network: 24 teaches 12, 12 teaches 6 …

    Args:
        taps: Names of all layers, ``1 … L``, in order; for a transformers model ``hidden_states.1`` and so on.
        weights: Of each pair ``(l, 2 l)``, ``l = 1 … L // 2``; see :class:`PairedLayers`, as for the arguments below.
        projection: See :class:`PairedLayers`.
        channel_dim: See :class:`PairedLayers`.

    Raises:
        ValueError: If there are fewer than two taps, and as :class:`PairedLayers`.
    """

    def __init__(
        self,
        taps: Sequence[str],
        weights: Sequence[float] | None = None,
        projection: Literal["linear", "mlp", "identity"] = "linear",
        channel_dim: int | None = None,
    ) -> None:
        pairs = [(taps[i - 1], taps[j - 1]) for i, j in hierarchical_pairs(len(taps))]
        super().__init__(pairs, weights, projection, channel_dim)
