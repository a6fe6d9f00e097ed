"""Two changes at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_distill.diagnostics.estimates import Estimate, bootstrap_mean


def synergy(
    base: float | Sequence[float],
    kd: float | Sequence[float],
    quant: float | Sequence[float],
    joint: float | Sequence[float],
    n_boot: int = 2000,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Whether two changes together do more than the sum of what each does alone: ``joint - kd - quant + base``.

    The interaction of a 2 x 2 design over seeds. ``verdict()`` says whether it is above zero.

    Args:
        base: Score without either change, a number or one per seed; higher is better.
        kd: Score with the first change (distillation), for the same seeds.
        quant: Score with the second change (quantization), for the same seeds.
        joint: Score with both.
        n_boot: Number of bootstrap samples, positive.
        generator: Source of randomness; by default one with a fixed seed.

    Raises:
        ValueError: If the numbers of seeds differ.

    Example:
        >>> round(synergy([0.76, 0.75], [0.75, 0.76], [0.73, 0.72], [0.735, 0.75]).value, 4)
        0.0175
    """
    scores = [torch.as_tensor(values, dtype=torch.float64).flatten() for values in (base, kd, quant, joint)]
    if len({values.numel() for values in scores}) != 1:
        raise ValueError(
            "`base`, `kd`, `quant` and `joint` must hold one score for each of the same seeds, got "
            f"{[values.numel() for values in scores]} scores."
        )
    return bootstrap_mean(scores[3] - scores[1] - scores[2] + scores[0], resamples=n_boot, generator=generator)
