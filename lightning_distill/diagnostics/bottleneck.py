"""Information of a discretised layer about target and input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.contingency import contingency_table, mutual_information
from lightning_distill.diagnostics.observations import fixed_generator, float64


@dataclass(frozen=True)
class LayerInformation:
    """Information of a discretised layer, nats.

    Attributes:
        about_target: ``I(F; Y)``, plug-in: too large for many cells and few samples.
        about_input: ``I(F; X) = H(F)``, as the layer is a function of the input.
        importance: Their ratio, in [0, 1]; 0 for a layer that says nothing.
        chance: Mean ratio after permuting the targets: what the number of cells alone gives.
        n: Number of samples; 0 for tables of probabilities.
    """

    about_target: float
    about_input: float
    importance: float
    chance: float
    n: int

    def lagrangian(self, beta: float) -> float:
        """``I(F; X) - beta I(F; Y)`` of the information bottleneck (Tishby et al. 1999)."""
        return self.about_input - beta * self.about_target


@torch.no_grad()
def ib_layer_importance(
    features: Tensor,
    targets: Tensor,
    *,
    clusters: int = 30,
    permutations: int = 20,
    generator: torch.Generator | None = None,
) -> LayerInformation:
    """Information of a layer about the target, over that about the input, after k-means clustering.

    A network without noise keeps all information of a continuous input, so that ``I(F; X)`` is infinite: only the
    discretised layer has a finite one, and it depends on the number of clusters (Saxe et al. 2018, Goldfeld et al.
    2019). Compare layers for the same number.

    Args:
        features: Shape ``(N, d)``.
        targets: Class indices, shape ``(N,)``.
        clusters: Cells of the discretisation, positive.
        permutations: Of the targets, not negative.
        generator: Source of randomness; by default one with a fixed seed.

    Raises:
        ValueError: If the shapes do not fit or an argument is outside its range.
    """
    if features.ndim != 2 or targets.shape != features.shape[:1] or len(features) == 0:
        raise ValueError(
            f"`features` must have shape (N, d) and `targets` (N,), got {tuple(features.shape)} and "
            f"{tuple(targets.shape)}."
        )
    if not clusters >= 1:
        raise ValueError(f"`clusters` must be positive, got {clusters}.")
    if not permutations >= 0:
        raise ValueError(f"`permutations` must not be negative, got {permutations}.")
    generator = fixed_generator(generator)
    cell = _k_means(float64(features), min(clusters, len(features)), generator)
    y = targets.detach().cpu().long().unique(return_inverse=True)[1]
    classes, n = int(y.max()) + 1, len(y)

    def about(y: Tensor) -> float:
        return max(mutual_information(contingency_table(y, cell, classes) / n), 0.0)

    size = torch.bincount(cell).double() / n
    entropy = torch.special.entr(size).sum().item()
    null = [about(y[torch.randperm(n, generator=generator)]) for _ in range(permutations)]
    chance = sum(null) / len(null) if null else 0.0
    ratio = 1 / entropy if entropy > 1e-12 else 0.0
    return LayerInformation(about(y), entropy, min(about(y) * ratio, 1.0), min(chance * ratio, 1.0), n)


@torch.no_grad()
def ib_layer_importance_from_joint(joint_target: Tensor, joint_input: Tensor) -> LayerInformation:
    """:func:`ib_layer_importance` where the joint distributions of layer and target, and layer and input, are known.

    Args:
        joint_target: Probabilities, shape ``(cells, targets)``.
        joint_input: Probabilities, shape ``(cells, inputs)``.

    Raises:
        ValueError: If the cells differ or a table is no distribution.
    """
    tables = [float64(joint) for joint in (joint_target, joint_input)]
    for table in tables:
        if table.ndim != 2 or not bool((table >= 0).all()) or not abs(table.sum().item() - 1) < 1e-4:
            raise ValueError(f"A joint distribution must be a table that sums to 1, got a sum of {table.sum():g}.")
    if len(tables[0]) != len(tables[1]):
        raise ValueError(f"The two tables must have the same cells, got {len(tables[0])} and {len(tables[1])}.")
    target, of_input = (mutual_information(table / table.sum()) for table in tables)
    return LayerInformation(target, of_input, target / of_input if of_input > 1e-12 else 0.0, 0.0, 0)


def _k_means(points: Tensor, clusters: int, generator: torch.Generator, rounds: int = 50) -> Tensor:
    """Cluster of each point, ``(N,)``: Lloyd's algorithm from k-means++ centres (Arthur and Vassilvitskii 2007)."""
    spread = points.std(dim=0, unbiased=False)
    points = (points - points.mean(dim=0)) / spread.where(spread > 1e-12, 1)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    nearest = torch.cdist(points, centres).square().squeeze(1)
    for _ in range(clusters - 1):
        if nearest.sum() == 0:  # fewer different points than clusters
            break
        chosen = points[torch.multinomial(nearest, 1, generator=generator)]
        centres = torch.cat([centres, chosen])
        nearest = torch.minimum(nearest, torch.cdist(points, chosen).square().squeeze(1))
    cell = torch.cdist(points, centres).argmin(dim=1)
    for _ in range(rounds):
        size = torch.bincount(cell, minlength=len(centres)).double()
        sums = torch.zeros_like(centres).index_add_(0, cell, points)
        centres = torch.where(size.unsqueeze(1) > 0, sums / size.clamp_min(1).unsqueeze(1), centres)
        moved = torch.cdist(points, centres).argmin(dim=1)
        if torch.equal(moved, cell):
            break
        cell = moved
    return cell
