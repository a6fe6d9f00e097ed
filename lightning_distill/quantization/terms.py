"""Losses of quantized students."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import check_same_shape, wide
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step
from lightning_distill.quantization.quantized_layer import QuantizedLayer

FLOAT_LOGITS = "float_logits"
QUANTIZED_LAYERS = "quantized_layers"


def soft_quantized_loss(
    quantized_logits: Tensor, float_logits: Tensor, teacher_logits: Tensor, *, beta: float = 0.25
) -> Tensor:
    r"""Match the teacher with quantized outputs, and keep the outputs before quantization close to them.

    .. math:: \| Q(f_S) - f_T \|^2 + \beta \| f_S - Q(f_S) \|^2

    per item, as means over the classes. The second part is that of a commitment (van den Oord et al. 2017, section 3.2,
    https://arxiv.org/abs/1711.00937).

    Args:
        quantized_logits: ``Q(f_S)``, shape ``(items..., C)``; gets gradients from both parts.
        float_logits: ``f_S``, same shape.
        teacher_logits: ``f_T``, same shape; detached here.
        beta: Weight of the second part, at least 0.

    Returns:
        Shape ``(items...)``, in float32 or wider.

    Raises:
        ValueError: If the shapes differ or ``beta`` is negative.

    Example:
        >>> soft_quantized_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.2, 0.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([0.5050])
    """
    if not beta >= 0:
        raise ValueError(f"`beta` must be at least 0, got {beta}.")
    check_same_shape(quantized_logits, teacher_logits)
    check_same_shape(float_logits, teacher_logits)
    quantized, exact = wide(quantized_logits), wide(float_logits)
    match = (quantized - wide(teacher_logits).detach()).square().mean(dim=-1)
    return match + beta * (exact - quantized).square().mean(dim=-1)


def weight_quantization_error(layers: Mapping[str, QuantizedLayer]) -> Tensor:
    r"""Squared rounding errors of all weights over the squared weights.

    .. math:: \sum_l \| W_l - Q(W_l) \|^2 / \sum_l \| W_l \|^2

    Its gradient draws the weights to their levels: levels are taken as they are, the sum of squares as a constant.

    Args:
        layers: Quantized layers; those in floating point count as 0.

    Returns:
        Scalar in float32 or wider; 0 where every weight is a level.

    Raises:
        ValueError: If there are no layers.
    """
    if not layers:
        raise ValueError("`layers` is empty: the student has no quantized layer. Call `prepare(student, spec)` first.")
    pairs = [(wide(layer.weight), wide(layer.quantized_weight()).detach()) for layer in layers.values()]
    power = sum(weight.detach().square().sum() for weight, _ in pairs)
    error = torch.stack([(weight - levels).square().sum() for weight, levels in pairs]).sum()
    return error / torch.as_tensor(power).clamp_min(1e-12)


class SoftQuantized(Term):
    """:func:`soft_quantized_loss` of the student's outputs with and without quantization; needs a ``QADModule``.

    It runs the student twice per step.

    Args:
        beta: Weight of the distance between the two, at least 0.

    Raises:
        ValueError: If ``beta`` is negative.
    """

    needs_float_logits = True

    def __init__(self, beta: float = 0.25) -> None:
        super().__init__()
        if not beta >= 0:
            raise ValueError(f"`beta` must be at least 0, got {beta}.")
        self.beta = beta

    def forward(self, step: Step) -> Tensor:
        """Loss of each item.

        Raises:
            ValueError: If nobody has run the student without quantization.
        """
        if FLOAT_LOGITS not in step.extras:
            raise ValueError("SoftQuantized compares a student with itself before quantization: use it in a QADModule.")
        said, teacher = step.student.logits, teacher_outputs(step).logits
        return soft_quantized_loss(said, step.extras[FLOAT_LOGITS], teacher, beta=self.beta)


class QuantizationError(Term):
    """:func:`weight_quantization_error` of the student, a scalar; needs a ``QADModule``."""

    needs_teacher = False

    def forward(self, step: Step) -> Tensor:
        """The share of the weights' square that rounding costs.

        Raises:
            ValueError: If the student is not quantized.
        """
        return weight_quantization_error(step.extras.get(QUANTIZED_LAYERS, {}))
