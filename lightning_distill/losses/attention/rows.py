"""Distances between rows of attention maps: what each query looks at.

Maps have the shape ``(..., queries, keys)``; each row is a probability distribution over the keys that it may see, and
0 elsewhere (padding, the future). All functions return one value per row, ``(..., queries)``, in float32 or wider; only
the student's map gets a gradient. ``visible``, boolean and broadcastable to the maps, tells which keys a row may see;
it matters to distances that are relative to their number, so that padding changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_distill.losses.distances.inputs import upcast


class RowDistance(Protocol):
    """A function of two attention maps ``(..., queries, keys)``.

    The result is a tensor; ``Any`` here lets the command line build objects with such a call.
    """

    def __call__(self, student: Tensor, teacher: Tensor, visible: Tensor | None = None) -> Any:
        """One value per row, ``(..., queries)``."""


def smooth_attention(attention: Tensor, *, eps: float = 1e-4, visible: Tensor | None = None) -> Tensor:
    """``(1 - eps) * A + eps / n`` over the ``n`` keys that a row may see; rows still sum to 1.

    In float32, where ``1 - 1e-8`` is 1 and an ``eps`` below 1e-7 does nothing to large entries.

    Args:
        attention: Shape ``(..., queries, keys)``.
        eps: From 0 to 1; 1e-6 to 1e-2 make sense.
        visible: Which keys each query may see, boolean, broadcastable; by default all. Others stay 0.

    Raises:
        ValueError: If ``eps`` is outside [0, 1].

    Example:
        >>> smooth_attention(torch.tensor([1.0, 0.0, 0.0]), eps=0.01, visible=torch.tensor([True, True, False]))
        tensor([0.9950, 0.0050, 0.0000])
    """
    _check_eps(eps)
    attention = attention.to(torch.promote_types(attention.dtype, torch.float32))
    if visible is None:
        return (1 - eps) * attention + eps / attention.shape[-1]
    number = visible.sum(dim=-1, keepdim=True).clamp_min(1).to(attention.dtype)
    return ((1 - eps) * attention + eps / number).where(visible, 0)


def attention_kl(student: Tensor, teacher: Tensor, visible: Tensor | None = None) -> Tensor:
    """KL divergence from the teacher's row to the student's, nats (MiniLM, Wang et al. 2020, section 3.1).

    Where the student is 0 and the teacher is not, the divergence is infinite; here it is large, and without a gradient
    there. :func:`smooth_attention` both maps first.

    Args:
        student: Shape ``(..., queries, keys)``.
        teacher: Same shape; detached here.
        visible: Not needed.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_maps(student, teacher)
    return (torch.xlogy(teacher, teacher) - torch.xlogy(teacher, _positive(student))).sum(dim=-1)


def attention_reverse_kl(student: Tensor, teacher: Tensor, visible: Tensor | None = None) -> Tensor:
    """KL divergence from the student's row to the teacher's, nats; see :func:`attention_kl`.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_maps(student, teacher)
    return (torch.xlogy(student, _positive(student)) - torch.xlogy(student, _positive(teacher))).sum(dim=-1)


def attention_js(student: Tensor, teacher: Tensor, visible: Tensor | None = None) -> Tensor:
    """Jensen-Shannon divergence of two rows, nats: symmetric, finite, at most ``log 2``.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_maps(student, teacher)
    log_mixture = _positive((student + teacher) / 2).log()
    of_teacher = torch.xlogy(teacher, teacher) - teacher * log_mixture
    of_student = torch.xlogy(student, _positive(student)) - student * log_mixture
    return (of_teacher + of_student).sum(dim=-1) / 2


def attention_wasserstein(
    student: Tensor, teacher: Tensor, visible: Tensor | None = None, *, normalize: bool = True
) -> Tensor:
    """Wasserstein-1 distance of two rows along the sequence: how far attention has to be carried.

    The cost of carrying it is the distance between positions, so that a neighbouring key is nearly right. Exact, from
    the cumulated rows.

    Args:
        student: Shape ``(..., queries, keys)``.
        teacher: Same shape; detached here.
        visible: Which keys count for ``normalize``; by default all.
        normalize: Whether to divide by the largest distance, one less than the number of keys that the row may see;
            else the unit is positions.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> attention_wasserstein(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]), normalize=False)
        tensor(2.)
    """
    student, teacher = same_maps(student, teacher)
    distance = (student - teacher).cumsum(dim=-1)[..., :-1].abs().sum(dim=-1)
    return distance / (_keys(student, visible) - 1).clamp_min(1) if normalize else distance


def attention_mse(student: Tensor, teacher: Tensor, visible: Tensor | None = None) -> Tensor:
    """Squared difference of two rows, mean over the keys that they may see.

    As TinyBERT has it (Jiao et al. 2020, equation 7), but of the maps and not of the scores before the softmax.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_maps(student, teacher)
    return (student - teacher).square().sum(dim=-1) / _keys(student, visible).clamp_min(1)


def sparse_attention(
    student: Tensor, teacher: Tensor, visible: Tensor | None = None, *, threshold: float = 1e-2
) -> Tensor:
    """Absolute difference where the teacher's attention is above ``threshold``, sum over those keys.

    What the student adds elsewhere is seen only by what it lacks here. A negative threshold gives the full distance.

    Args:
        student: Shape ``(..., queries, keys)``.
        teacher: Same shape; detached here.
        visible: Not needed.
        threshold: See :func:`sparse_thresholds` for one per layer.

    Raises:
        ValueError: If the shapes differ.
    """
    student, teacher = same_maps(student, teacher)
    return (student - teacher).abs().where(teacher > threshold, 0).sum(dim=-1)


@dataclass(frozen=True)
class SparseAttention:
    """:func:`sparse_attention` with a threshold.

    Args:
        threshold: See :func:`sparse_attention`.

    Example:
        >>> distances = [SparseAttention(threshold) for threshold in sparse_thresholds(4)]  # one for each layer
    """

    threshold: float = 1e-2

    def __call__(self, student: Tensor, teacher: Tensor, visible: Tensor | None = None) -> Tensor:
        """One value per row, ``(..., queries)``."""
        return sparse_attention(student, teacher, threshold=self.threshold)


def sparse_thresholds(layers: int, threshold: float = 1e-2, growth: float = 1.0) -> list[float]:
    """Threshold of each layer ``l`` of ``L``: ``threshold * (1 + growth * l / L)``, counted from 1.

    Raises:
        ValueError: If there is no layer.

    Example:
        >>> sparse_thresholds(2, 0.01)
        [0.015, 0.02]
    """
    if not layers >= 1:
        raise ValueError(f"`layers` must be positive, got {layers}.")
    return [threshold * (1 + growth * layer / layers) for layer in range(1, layers + 1)]


ROW_DISTANCES: dict[str, RowDistance] = {
    "js": attention_js,
    "kl": attention_kl,
    "mse": attention_mse,
    "reverse_kl": attention_reverse_kl,
    "sparse": sparse_attention,
    "wasserstein": attention_wasserstein,
}
"""Distances between rows by the names that terms know them by."""


def visible_keys(student: Tensor, teacher: Tensor) -> Tensor:
    """Keys that either map looks at: a softmax is exactly 0 where a mask forbids, and positive elsewhere."""
    return (student.detach() > 0) | (teacher.detach() > 0)


def same_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float32 or wider, the teacher detached.

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"Attention maps must have one shape, got {tuple(student.shape)} for the student and "
            f"{tuple(teacher.shape)} for the teacher. Other numbers of heads need `heads='aligned'` or 'mean'; other "
            "lengths cannot be compared: give both networks the same tokens."
        )
    return upcast(student, teacher)


def _keys(attention: Tensor, visible: Tensor | None) -> Tensor:
    """Number of keys of each row, ``(...)`` or broadcastable to it."""
    return torch.tensor(attention.shape[-1]) if visible is None else visible.sum(dim=-1)


def _positive(probabilities: Tensor) -> Tensor:
    """At least the smallest normal number, without a gradient below it."""
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny)


def _check_eps(eps: float) -> None:
    if not 0 <= eps <= 1:
        raise ValueError(f"`eps`, the share of uniform attention, must be in [0, 1], got {eps}.")
