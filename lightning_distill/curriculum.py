"""Which samples to train on when: difficulties of samples, and weights that follow from them.

A curriculum is a function of the difficulties, shape ``(N,)``, and of the progress of the training, in [0, 1], that
returns the weight by which each sample is drawn. :class:`~lightning_distill.callbacks.CurriculumResampling` applies it.

On whether it helps: there is no general rate by which it does, and over many data sets, architectures and orders no
benefit was found in standard training, some with short budgets or noisy labels (Wu, Dyer and Neyshabur 2021, "When do
curricula work?", https://arxiv.org/abs/2012.03107). Compare it with the same sizes in random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor


class Curriculum(Protocol):
    """From difficulties and progress to sampling weights (a tensor; ``Any`` is for the command line's type check)."""

    def __call__(self, difficulty: Tensor, progress: float) -> Any:
        """Weight of each sample, not negative, not all zero; shape ``(N,)``."""


def static_stage(difficulty: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The stage in which each sample comes in: 1 below the first threshold, 2 below the second, and so on.

    Args:
        difficulty: Shape ``(N,)``.
        thresholds: Ascending; a sample at a threshold belongs to the harder stage.

    Returns:
        Integers from 1 to ``len(thresholds) + 1``, shape ``(N,)``.

    Raises:
        ValueError: If the thresholds do not ascend.

    Example:
        >>> static_stage(torch.tensor([0.1, 0.5, 1.0, 2.0]), [0.5, 1.5]).tolist()
        [1, 2, 2, 3]
    """
    _check_ascending("thresholds", thresholds)
    limits = torch.tensor([*map(float, thresholds)], dtype=difficulty.dtype, device=difficulty.device)
    return 1 + torch.searchsorted(limits, difficulty.contiguous(), right=True)


def select_probability(difficulty: Tensor, limit: float | Tensor, *, width: float | Tensor) -> Tensor:
    r"""Probability with which a sample is taken: :math:`\sigma((\mu - d) / w)`, near 1 below ``limit``, near 0 above.

    As ``limit`` grows over the training, harder samples come in.

    Args:
        difficulty: ``d``, any shape.
        limit: ``mu``, the difficulty at which the probability is one half.
        width: ``w``, positive: how soft the limit is.

    Raises:
        ValueError: If ``width`` is not positive.

    Example:
        >>> select_probability(torch.tensor([0.0, 1.0, 2.0]), 1.0, width=0.5)
        tensor([0.8808, 0.5000, 0.1192])
    """
    if not bool(torch.as_tensor(width) > 0):
        raise ValueError(f"`width` must be positive, got {width}.")
    return torch.sigmoid((limit - difficulty) / width)


def adaptive_weight(
    difficulty: Tensor, student_confidence: Tensor, *, alpha: float = 0.5, gamma: float = 0.6
) -> Tensor:
    """``1 + alpha * difficulty`` where the student is not sure yet, else 1: more of what is hard and not learnt.

    Args:
        difficulty: Not negative, any shape.
        student_confidence: The student's largest probability for each sample, same shape.
        alpha: Not negative.
        gamma: Confidence from which on a sample counts as learnt, in [0, 1].

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> adaptive_weight(torch.tensor([0.5, 2.0]), torch.tensor([0.3, 0.9]))
        tensor([1.2500, 1.0000])
    """
    if not alpha >= 0:
        raise ValueError(f"`alpha` must not be negative, got {alpha}.")
    if not 0 <= gamma <= 1:
        raise ValueError(f"`gamma`, a probability, must be in [0, 1], got {gamma}.")
    return torch.where(student_confidence < gamma, 1 + alpha * difficulty, 1.0)


@dataclass(frozen=True)
class StagedCurriculum:
    """The easiest samples first, then further groups (Bengio et al. 2009, "Curriculum learning").

    Args:
        quantiles: Shares of the samples, ascending in (0, 1), at which groups end: thirds by default.
        starts: Progress at which each further group comes in, ascending in (0, 1), one per quantile.
        cumulative: Whether earlier groups stay ("baby steps") or leave ("one pass").

    Raises:
        ValueError: If an argument is outside its range; when called, if a stage has no samples because too many are
            equally difficult.
    """

    quantiles: Sequence[float] = (1 / 3, 2 / 3)
    starts: Sequence[float] = (1 / 3, 2 / 3)
    cumulative: bool = True

    def __post_init__(self) -> None:
        for name in ("quantiles", "starts"):
            values = getattr(self, name)
            _check_ascending(name, values)
            if not values or not values[0] > 0 or not values[-1] < 1:
                raise ValueError(f"`{name}` must be in (0, 1), at least one, got {list(values)}.")
        if len(self.quantiles) != len(self.starts):
            raise ValueError(
                f"Each of the {len(self.quantiles)} `quantiles` needs a start of the group above it, got "
                f"{len(self.starts)} `starts`."
            )

    def stage(self, progress: float) -> int:
        """Number of the stage at ``progress``, from 1."""
        return 1 + sum(start <= progress for start in self.starts)

    def __call__(self, difficulty: Tensor, progress: float) -> Tensor:
        """1 for the samples of the present stage, 0 for the others."""
        shares = torch.tensor([*map(float, self.quantiles)], dtype=torch.float64)
        limits = difficulty.double().quantile(shares)
        group, stage = static_stage(difficulty.double(), limits.tolist()), self.stage(progress)
        chosen = group <= stage if self.cumulative else group == stage
        if not chosen.any():
            raise ValueError(
                f"Stage {stage} of the curriculum has no samples: too many of the {len(difficulty)} samples are "
                f"equally difficult (the limits are {[round(limit, 4) for limit in limits.tolist()]}). Use fewer "
                "groups, another difficulty, or `SigmoidCurriculum`."
            )
        return chosen.double()


@dataclass(frozen=True)
class SigmoidCurriculum:
    """Draw by :func:`select_probability`, with a limit that moves from the easiest sample to the hardest.

    Args:
        width: Softness of the limit, as a share of the range of difficulties; positive.
        complete: Progress at which the limit is at the hardest sample and stays, in (0, 1].

    Raises:
        ValueError: If an argument is outside its range.
    """

    width: float = 0.1
    complete: float = 1.0

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(f"`width` must be positive, got {self.width}.")
        if not 0 < self.complete <= 1:
            raise ValueError(f"`complete` must be in (0, 1], got {self.complete}.")

    def __call__(self, difficulty: Tensor, progress: float) -> Tensor:
        """Probability of each sample."""
        values = difficulty.double()
        low, high = values.min(), values.max()
        if low == high:
            return torch.ones_like(values)
        limit = low + (high - low) * min(progress / self.complete, 1.0)
        return select_probability(values, limit, width=self.width * (high - low))


def _check_ascending(name: str, values: Sequence[float]) -> None:
    if any(not first <= second for first, second in pairwise(values)):
        raise ValueError(f"`{name}` must ascend, got {list(values)}.")


__all__ = [
    "Curriculum",
    "SigmoidCurriculum",
    "StagedCurriculum",
    "adaptive_weight",
    "select_probability",
    "static_stage",
]
