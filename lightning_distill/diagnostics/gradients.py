"""What temperature does to gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_distill.diagnostics.observations import float64
from lightning_distill.losses.soft_targets import softened_log_softmax


@dataclass(frozen=True)
class GradientScale:
    """Mean norm over the items of the gradient of the forward KL with respect to the student's logits.

    Attributes:
        temperatures: Where it was measured.
        scaled: Norm for ``T^2 KL``.
        unscaled: Norm for the plain KL; the same as ``T^2 KL`` with a weight of ``1 / T^2``.
    """

    temperatures: tuple[float, ...]
    scaled: tuple[float, ...]
    unscaled: tuple[float, ...]

    def spread(self, low: float = 2.0, high: float = 20.0) -> float:
        """Largest over smallest scaled norm among the temperatures in ``[low, high]``; 1 is perfectly flat.

        Raises:
            ValueError: If no temperature is in the interval.
        """
        inside = [norm for tau, norm in zip(self.temperatures, self.scaled, strict=True) if low <= tau <= high]
        if not inside:
            raise ValueError(f"No temperature of {list(self.temperatures)} is in [{low}, {high}].")
        return 1.0 if max(inside) == 0 else max(inside) / max(min(inside), torch.finfo(torch.float64).tiny)


@torch.no_grad()
def gradient_scale_curve(
    student_logits: Tensor, teacher_logits: Tensor, temperatures: Sequence[float]
) -> GradientScale:
    r"""How large the gradient of the soft-target loss is, by temperature.

    The gradient is :math:`\tau (p_S - p_T)` with the factor :math:`\tau^2` and :math:`(p_S - p_T) / \tau` without it
    (Hinton et al. 2015, section 2.1, https://arxiv.org/abs/1503.02531). The first tends to the centred difference of
    the logits divided by ``C``, the second vanishes.

    Args:
        student_logits: Shape ``(items..., C)``.
        teacher_logits: Same shape.
        temperatures: One or more, positive.

    Raises:
        ValueError: If the shapes differ, or a temperature is missing or not positive.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "`student_logits` and `teacher_logits` must have the same shape, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    if len(temperatures) == 0:
        raise ValueError("`temperatures` must hold at least one temperature, got none.")
    student, teacher = float64(student_logits), float64(teacher_logits)
    taus = tuple(float(tau) for tau in temperatures)
    distances = [
        (softened_log_softmax(student, tau).exp() - softened_log_softmax(teacher, tau).exp()).norm(dim=-1).mean().item()
        for tau in taus
    ]
    return GradientScale(
        taus,
        tuple(tau * distance for tau, distance in zip(taus, distances, strict=True)),
        tuple(distance / tau for tau, distance in zip(taus, distances, strict=True)),
    )
