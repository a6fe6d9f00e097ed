"""What a linear probe reads from each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.diagnostics.layer_profile import LayerProfile, layer_profile
from lightning_distill.diagnostics.observations import float64


@torch.no_grad()
def linear_probe_profile(
    hidden: Sequence[Tensor],
    targets: Tensor,
    validation_hidden: Sequence[Tensor],
    validation_targets: Tensor,
    *,
    ridge: float = 1e-3,
) -> LayerProfile:
    """How well a linear probe reads a target from each layer (Alain and Bengio 2016).

    Ridge regression in closed form, on standardised features. Classes become one-hot targets, and the score is the
    accuracy on the validation data; of numbers it is one minus the squared error over the variance, an ``R^2``. Compare
    a low-level and a high-level target to see which layers hold which.

    Args:
        hidden: Features of each layer, each ``(N, d_l)``: pool sequences and maps first.
        targets: Class indices, or numbers, shape ``(N,)``.
        validation_hidden: The same for samples that the probe did not see.
        validation_targets: Their targets.
        ridge: Penalty of squared weights, relative to the number of samples; not negative.

    Raises:
        ValueError: If the layers or samples do not fit, or ``ridge`` is negative.
    """
    if not ridge >= 0:
        raise ValueError(f"`ridge` must not be negative, got {ridge}.")
    if len(hidden) == 0 or len(hidden) != len(validation_hidden):
        raise ValueError(
            f"`hidden` and `validation_hidden` must hold the same layers, got {len(hidden)} and "
            f"{len(validation_hidden)}."
        )
    for name, layers, y in (
        ("hidden", hidden, targets),
        ("validation_hidden", validation_hidden, validation_targets),
    ):
        for layer in layers:
            if layer.ndim != 2 or len(layer) != len(y) or len(y) == 0:
                raise ValueError(f"`{name}` must have shape ({len(y)}, d) like its targets, got {tuple(layer.shape)}.")
    scores = [
        _probe_scores(float64(seen), float64(unseen), targets, validation_targets, ridge)
        for seen, unseen in zip(hidden, validation_hidden, strict=True)
    ]
    return layer_profile(torch.stack(scores))


def _probe_scores(train: Tensor, validation: Tensor, y: Tensor, validation_y: Tensor, ridge: float) -> Tensor:
    """One score per validation sample: 1 for a hit, or ``1 - squared error / variance``."""
    mean, spread = train.mean(dim=0), train.std(dim=0, unbiased=False)
    spread = spread.where(spread > 1e-12, 1)
    a, b = ((side - mean) / spread for side in (train, validation))
    classes = not y.is_floating_point()
    y, validation_y = y.detach().cpu(), validation_y.detach().cpu()
    target = (
        torch.nn.functional.one_hot(y.long(), int(max(y.max(), validation_y.max())) + 1).double()
        if classes
        else y.double().unsqueeze(1)
    )
    level = target.mean(dim=0)
    gram = a.T @ a + max(ridge, 1e-12) * len(a) * torch.eye(a.shape[1], dtype=torch.float64)
    predicted = b @ torch.linalg.solve(gram, a.T @ (target - level)) + level
    if classes:
        hits: Tensor = predicted.argmax(dim=1) == validation_y
        return hits.double()
    truth = validation_y.double()
    score: Tensor = 1 - (predicted.squeeze(1) - truth).square() / truth.var(unbiased=False).clamp_min(1e-300)
    return score
