"""Decoupled knowledge distillation: the target class and the other classes apart."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import (
    check_same_shape,
    kl_divergence,
    relative_entropy,
    softened_log_softmax,
)
from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import UNLABELLED, Step


def target_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""KL divergence between the two-valued distributions "target or not" of each item, nats, times ``T ** 2``.

    .. math:: T^2 \left[ p_t \log\frac{p_t}{q_t} + (1 - p_t) \log\frac{1 - p_t}{1 - q_t} \right]

    with softened teacher ``p`` and student ``q``: TCKD of Zhao et al. (2022), section 3.1.

    Args:
        student_logits: Shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Same shape; detached here.
        labels: Class indices of shape ``(items...)``, ``-100`` where there is none.
        temperature: ``T > 0``; a number, or one value per item.

    Returns:
        Shape ``(items...)``, in float32 or wider; 0 for items without a label, and if there is only one class.

    Raises:
        ValueError: If shapes do not fit, or ``labels`` are class probabilities.
    """
    _check(student_logits, teacher_logits, labels)
    if student_logits.shape[-1] < 2:
        return _nothing(student_logits)
    log_q = _target_or_not(student_logits, labels, temperature)
    log_p = _target_or_not(teacher_logits.detach(), labels, temperature)
    return _of_labelled(relative_entropy(log_p, log_q) * temperature**2, labels)


def non_target_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""KL divergence between the distributions over the classes other than the target, nats, times ``T ** 2``.

    .. math:: T^2 \sum_{c \ne t} \hat p_c \log\frac{\hat p_c}{\hat q_c}, \qquad \hat p_c = \frac{p_c}{1 - p_t}

    NCKD of Zhao et al. (2022), section 3.1: what the teacher knows about the wrong classes, whatever its confidence.

    Args:
        student_logits: Shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Same shape; detached here.
        labels: Class indices of shape ``(items...)``, ``-100`` where there is none.
        temperature: ``T > 0``; a number, or one value per item.

    Returns:
        Shape ``(items...)``, in float32 or wider; 0 for items without a label, and if there are fewer than three
        classes.

    Raises:
        ValueError: If shapes do not fit, or ``labels`` are class probabilities.
    """
    _check(student_logits, teacher_logits, labels)
    if student_logits.shape[-1] < 2:
        return _nothing(student_logits)
    student, teacher = without_target(student_logits, labels), without_target(teacher_logits, labels)
    return _of_labelled(kl_divergence(student, teacher, temperature=temperature), labels)


def decoupled_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    r"""Decoupled knowledge distillation of each item: ``alpha * TCKD + beta * NCKD``, nats, times ``T ** 2``.

    The KL divergence is ``TCKD + (1 - p_t) * NCKD``: the surer the teacher, the less is learnt from what it says about
    the other classes. Here that weight is set free. Zhao et al. (2022), section 3.3, https://arxiv.org/abs/2203.08679.

    Args:
        student_logits: Shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Same shape; detached here.
        labels: Class indices of shape ``(items...)``, ``-100`` where there is none.
        alpha: Weight of :func:`target_divergence`, not negative.
        beta: Weight of :func:`non_target_divergence`, not negative. The paper chooses it for each pair of networks: up
            to 8 on CIFAR-100, 0.5 on ImageNet.
        temperature: ``T > 0``; a number, or one value per item.

    Returns:
        Shape ``(items...)``, in float32 or wider; 0 for items without a label.

    Raises:
        ValueError: If shapes do not fit, ``labels`` are class probabilities, or a weight is negative.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]])
        >>> decoupled_divergence(student, teacher, torch.tensor([0]))
        tensor([3.6969])
    """
    _check_weights(alpha, beta)
    target = target_divergence(student_logits, teacher_logits, labels, temperature=temperature)
    non_target = non_target_divergence(student_logits, teacher_logits, labels, temperature=temperature)
    return alpha * target + beta * non_target


class DKD(Term):
    """Decoupled knowledge distillation at the temperature of the step; see :func:`decoupled_divergence`.

    It needs to know the target: items without a label add nothing. For them :class:`SoftTargets` is the term to use.
    The paper warms the weight of this term up linearly over the first 20 epochs on CIFAR-100.

    Args:
        alpha: Weight of the divergence on "target or not", not negative.
        beta: Weight of the divergence over the other classes, not negative.

    Raises:
        ValueError: If a weight is negative.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 8.0) -> None:
        super().__init__()
        _check_weights(alpha, beta)
        self.alpha = alpha
        self.beta = beta

    def forward(self, step: Step) -> Tensor:
        """Decoupled divergence of each item, nats."""
        student, teacher = step.student.logits, teacher_outputs(step).logits
        if step.labels is None:
            check_same_shape(student, teacher)
            return _nothing(student)
        return decoupled_divergence(
            student, teacher, step.labels, alpha=self.alpha, beta=self.beta, temperature=step.temperature
        )


def without_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits of the classes other than the target, shape ``(items..., C - 1)``; for labels ``-100`` without class 0.

    The order is that of the classes, except that the last class stands where the target was: removing a column
    like this costs no boolean indexing, for which the host would wait for the device.

    Example:
        >>> without_target(torch.tensor([[5.0, 6.0, 7.0, 8.0]]), torch.tensor([1]))
        tensor([[5., 8., 7.]])
    """
    return logits.scatter(-1, _index(labels), logits[..., -1:])[..., :-1]


def _target_or_not(logits: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """Log-probabilities of "target" and "not target", shape ``(items..., 2)``."""
    log_p = softened_log_softmax(logits, temperature)
    target = log_p.gather(-1, _index(labels))
    # log(1 - p) from p would be -inf for a sure network; the sum over the others is finite.
    rest = without_target(log_p, labels).logsumexp(dim=-1, keepdim=True)
    return torch.cat([target, rest], dim=-1)


def _index(labels: Tensor) -> Tensor:
    return labels.clamp_min(0).unsqueeze(-1)


def _of_labelled(values: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels != UNLABELLED, values, 0)


def _nothing(logits: Tensor) -> Tensor:
    """0 for each item, with a graph."""
    return 0.0 * logits[..., 0].to(torch.promote_types(logits.dtype, torch.float32))


def _check(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
    check_same_shape(student_logits, teacher_logits)
    if labels.is_floating_point():
        raise ValueError(
            "`labels` are class probabilities, but decoupled distillation needs one target class per item. Use "
            "`SoftTargets` with mixed labels, or leave mixup out."
        )
    if labels.shape != student_logits.shape[:-1]:
        raise ValueError(
            f"`labels` have shape {tuple(labels.shape)}, expected one class index per item: "
            f"{tuple(student_logits.shape[:-1])}."
        )


def _check_weights(alpha: float, beta: float) -> None:
    for name, value in {"alpha": alpha, "beta": beta}.items():
        if not value >= 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
