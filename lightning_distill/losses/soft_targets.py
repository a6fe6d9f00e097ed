"""Divergences between the softened predictions of student and teacher."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.losses.term import Term, teacher_outputs
from lightning_distill.outputs import Step

Direction = Literal["forward", "reverse"]


def softened_log_softmax(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """``log softmax(logits / T)`` over the last dimension, in float32 or wider.

    Below temperature 1 the maximum is subtracted before the division: ``z / T`` of large logits would round away the
    differences that count. Under autocast nothing is computed in half precision.

    Args:
        logits: Unnormalised scores, shape ``(items..., C)``.
        temperature: ``T > 0``, no unit; a number, or a tensor with one value per item (its dimensions are those of
            the items, each of their size or 1). The values of a tensor are not checked: that would make the host
            wait for the device.

    Returns:
        Natural logarithms of probabilities, shape ``(items..., C)``.

    Raises:
        ValueError: If ``temperature`` is a number that is not positive and finite, or a tensor of another shape.

    Example:
        >>> softened_log_softmax(torch.tensor([10000.0, 9999.0]), 0.01)
        tensor([   0., -100.])
    """
    logits = wide(logits)
    if isinstance(temperature, Tensor):
        divisor = _per_item(temperature, logits)
        return ((logits - logits.detach().amax(dim=-1, keepdim=True)) / divisor).log_softmax(dim=-1)
    check_temperature(temperature)
    if temperature >= 1:  # dividing cannot magnify the rounding of the logits
        return (logits if temperature == 1 else logits / temperature).log_softmax(dim=-1)
    # In place: one matrix of the size of the logits less, and nothing of it is needed backwards.
    return (logits - logits.detach().amax(dim=-1, keepdim=True)).div_(temperature).log_softmax(dim=-1)


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    direction: Direction = "forward",
    scale_by_t2: bool = True,
) -> Tensor:
    r"""KL divergence between softened teacher ``p`` and softened student ``q`` of each item, in nats, times ``T ** 2``.

    .. math::
        T^2 \sum_c p_c \log\frac{p_c}{q_c} \;\text{(forward)}, \qquad
        T^2 \sum_c q_c \log\frac{q_c}{p_c} \;\text{(reverse)}, \qquad
        p = \sigma(z^t / T), \; q = \sigma(z^s / T)

    The forward gradient is ``T * (q - p)``, which tends to the centred difference of the logits divided by ``C``: with
    the factor ``T ** 2`` its size depends little on ``T``, so that weights can stay when ``T`` changes (Hinton,
    Vinyals and Dean 2015, section 2, https://arxiv.org/abs/1503.02531). Forward covers every mode of the teacher,
    reverse seeks one (Gu et al. 2024, MiniLLM).

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Unnormalised scores, same shape; detached here.
        temperature: ``T > 0``; a number, or one value per item, each item then being scaled by its own square.
        direction: ``"forward"`` is KL(teacher || student), ``"reverse"`` is KL(student || teacher).
        scale_by_t2: Whether to multiply by ``T ** 2``. Do not combine it with a weight that falls as ``1 / T ** 2``.

    Returns:
        Shape ``(items...)``, in float32 or wider; at least 0 up to rounding.

    Raises:
        ValueError: If the shapes differ, ``temperature`` is not positive and finite, or ``direction`` is unknown.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> kl_divergence(student, teacher)
        tensor([1.5232])
    """
    if direction not in ("forward", "reverse"):
        raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    divergence = relative_entropy(log_p, log_q) if direction == "forward" else relative_entropy(log_q, log_p)
    return _scale(divergence, temperature, scale_by_t2)


def jensen_shannon_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    scale_by_t2: bool = True,
) -> Tensor:
    r"""Generalized Jensen-Shannon divergence of each item, in nats, times ``T ** 2``.

    .. math::
        T^2 \left[ \beta \, \mathrm{KL}(p \,\|\, m) + (1 - \beta) \, \mathrm{KL}(q \,\|\, m) \right], \qquad
        m = \beta p + (1 - \beta) q

    with teacher ``p`` and student ``q``: Agarwal et al. (2024), section 2, https://arxiv.org/abs/2306.13649. The ends
    are *defined* as the plain divergences, as TRL and Liger do: ``beta=0`` is the forward KL and ``beta=1`` the reverse
    KL. The formula itself goes to 0 there: for small ``beta`` it behaves as ``beta`` times the forward KL, for
    ``beta`` near 1 as ``1 - beta`` times the reverse KL, so between 0 and, say, 0.01 the size jumps while the direction
    of the gradient does not.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Unnormalised scores, same shape; detached here.
        beta: In [0, 1]; 0.5 is the symmetric divergence, which is at most ``log 2`` before the factor ``T ** 2``.
        temperature: As in :func:`kl_divergence`.
        scale_by_t2: As in :func:`kl_divergence`.

    Returns:
        Shape ``(items...)``, in float32 or wider; at least 0 up to rounding.

    Raises:
        ValueError: If ``beta`` is outside [0, 1], and as in :func:`kl_divergence`.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> jensen_shannon_divergence(student, teacher)
        tensor([0.3278])
    """
    _check_share("beta", beta)
    if beta in (0, 1):
        direction: Direction = "forward" if beta == 0 else "reverse"
        return kl_divergence(
            student_logits, teacher_logits, temperature=temperature, direction=direction, scale_by_t2=scale_by_t2
        )
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return _scale(
        beta * relative_entropy(log_p, log_m) + (1 - beta) * relative_entropy(log_q, log_m), temperature, scale_by_t2
    )


def skewed_kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    skew: float = 0.1,
    temperature: float | Tensor = 1.0,
    direction: Direction = "forward",
    scale_by_t2: bool = True,
) -> Tensor:
    r"""Skewed KL divergence of each item, in nats, times ``T ** 2``.

    .. math::
        T^2 \, \mathrm{KL}(p \,\|\, \lambda p + (1 - \lambda) q) \;\text{(forward)}, \qquad
        T^2 \, \mathrm{KL}(q \,\|\, \lambda q + (1 - \lambda) p) \;\text{(reverse)}

    with teacher ``p``, student ``q`` and skew ``lambda``: Ko et al. (2024), DistiLLM, section 3.1,
    https://arxiv.org/abs/2402.03898. The mixture keeps the ratio of the two below ``1 / lambda``, which bounds loss and
    gradient where the student gives a class almost no probability.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Unnormalised scores, same shape; detached here.
        skew: ``lambda`` in [0, 1); 0 is the plain KL divergence.
        temperature: As in :func:`kl_divergence`.
        direction: ``"forward"`` mixes teacher into student, ``"reverse"`` student into teacher.
        scale_by_t2: As in :func:`kl_divergence`.

    Returns:
        Shape ``(items...)``, in float32 or wider; from 0 (up to rounding) to ``-log(skew)`` before the factor.

    Raises:
        ValueError: If ``skew`` is outside [0, 1), and as in :func:`kl_divergence`.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> skewed_kl_divergence(student, teacher)
        tensor([1.0988])
    """
    check_skew(skew)
    if direction not in ("forward", "reverse"):
        raise ValueError(f"`direction` must be 'forward' or 'reverse', got {direction!r}.")
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    mixture = _log_mixture(first, second, skew) if skew > 0 else second
    return _scale(relative_entropy(first, mixture), temperature, scale_by_t2)


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, scale_by_t2: bool = True
) -> Tensor:
    r"""Cross-entropy of the softened student under the softened teacher, of each item, in nats, times ``T ** 2``.

    .. math:: -T^2 \sum_c p_c \log q_c = T^2 \left[ H(p) + \mathrm{KL}(p \,\|\, q) \right]

    Its gradient is that of the forward KL divergence, and minimising it maximises the log-likelihood that the teacher
    expects. Its minimum is the teacher's entropy, not 0, so :func:`kl_divergence` tells more when it is logged.

    Args:
        student_logits: Unnormalised scores, shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Unnormalised scores, same shape; detached here.
        temperature: As in :func:`kl_divergence`.
        scale_by_t2: As in :func:`kl_divergence`.

    Returns:
        Shape ``(items...)``, in float32 or wider.

    Raises:
        ValueError: As in :func:`kl_divergence`.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 4), torch.tensor([[3.0, 0.0, 1.0, 2.0]]))
        tensor([1.3863])
    """
    log_q, log_p = _log_probabilities(student_logits, teacher_logits, temperature)
    return _scale(-(log_p.exp() * log_q).sum(dim=-1), temperature, scale_by_t2)


class SoftTargets(Term):
    """Divergence of the student's softened predictions from the teacher's, at the temperature of the step.

    ``beta`` chooses the divergence as in on-policy distillation: 0 forward KL, 1 reverse KL, between them the
    generalized Jensen-Shannon divergence. ``skew`` bounds either KL by mixing one side into the other.

    Args:
        beta: In [0, 1]; see :func:`jensen_shannon_divergence`.
        skew: In [0, 1); see :func:`skewed_kl_divergence`. Only with ``beta`` 0 or 1.
        scale_by_t2: Whether to multiply by the square of the temperature.

    Raises:
        ValueError: If ``beta`` or ``skew`` is outside its range, or both are used at once.

    Example:
        >>> from lightning_distill.outputs import Outputs, Step
        >>> step = Step(None, Outputs(torch.tensor([[2.0, 0.0]])), Outputs(torch.tensor([[0.0, 2.0]])))
        >>> SoftTargets()(step)
        tensor([1.5232])
    """

    def __init__(self, beta: float = 0.0, skew: float = 0.0, scale_by_t2: bool = True) -> None:
        super().__init__()
        _check_share("beta", beta)
        check_skew(skew, beta)
        self.beta = beta
        self.skew = skew
        self.scale_by_t2 = scale_by_t2

    def forward(self, step: Step) -> Tensor:
        """Divergence of each item, nats."""
        return self.divergence(step.student.logits, teacher_outputs(step).logits, step.temperature)

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
        """The divergence that was chosen, of each item, nats."""
        arguments: dict[str, Any] = {"temperature": temperature, "scale_by_t2": self.scale_by_t2}
        if self.skew > 0:
            direction: Direction = "forward" if self.beta == 0 else "reverse"
            return skewed_kl_divergence(
                student_logits, teacher_logits, skew=self.skew, direction=direction, **arguments
            )
        return jensen_shannon_divergence(student_logits, teacher_logits, beta=self.beta, **arguments)


def wide(values: Tensor) -> Tensor:
    """``values`` in float32 or wider."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats of distributions given by their logarithms, over the last dimension; nothing is detached."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def check_same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits that cannot be compared class by class.

    Raises:
        ValueError: If the class counts or the item shapes differ; the message names both and the fix.
    """
    if student_logits.shape == teacher_logits.shape:
        return
    student_classes, teacher_classes = student_logits.shape[-1], teacher_logits.shape[-1]
    if student_classes != teacher_classes:
        raise ValueError(
            f"The student has {student_classes} classes, the teacher {teacher_classes}; a loss on logits compares them "
            "class by class. Give the student as many outputs as the teacher, or cut both to the classes that they "
            "share (padded vocabularies differ in size: `logits[..., :vocabulary]`)."
        )
    raise ValueError(
        f"The student's logits have items of shape {tuple(student_logits.shape[:-1])}, the teacher's "
        f"{tuple(teacher_logits.shape[:-1])}; both must see the same batch."
    )


def check_temperature(temperature: float) -> None:
    """Refuse a temperature by which logits cannot be divided.

    Raises:
        ValueError: If ``temperature`` is not positive and finite.
    """
    if not 0 < temperature < math.inf:  # also rejects NaN
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")


def _log_probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    check_same_shape(student_logits, teacher_logits)
    # The teacher is detached, not run without gradients: a learnt temperature gets its gradient through both sides.
    teacher_logits = teacher_logits.detach()
    return softened_log_softmax(student_logits, temperature), softened_log_softmax(teacher_logits, temperature)


def _log_mixture(log_first: Tensor, log_second: Tensor, share: float) -> Tensor:
    """``log(share * first + (1 - share) * second)``."""
    return torch.logaddexp(log_first + math.log(share), log_second + math.log1p(-share))


def _scale(divergence: Tensor, temperature: float | Tensor, scale_by_t2: bool) -> Tensor:
    return divergence * temperature**2 if scale_by_t2 else divergence


def _per_item(temperature: Tensor, logits: Tensor) -> Tensor:
    """``temperature`` with a class dimension."""
    items = logits.shape[:-1]
    if temperature.ndim == 0:
        return temperature
    if temperature.ndim != len(items) or any(
        size not in (1, of_items) for size, of_items in zip(temperature.shape, items, strict=True)
    ):
        raise ValueError(
            f"`temperature` has shape {tuple(temperature.shape)}, the items have {tuple(items)}; give one number, or "
            "one value per item (for one per sequence, of shape (B, 1))."
        )
    return temperature.unsqueeze(-1)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}.")


def check_skew(skew: float, beta: float = 0.0) -> None:
    """Refuse a skew outside [0, 1), and one of a divergence that is a mixture already."""
    if not 0 <= skew < 1:
        raise ValueError(f"`skew` must be in [0, 1), got {skew}.")
    if skew > 0 and beta not in (0, 1):
        raise ValueError(
            f"`skew` needs `beta` 0 (forward KL) or 1 (reverse KL), got skew={skew} and beta={beta}. The "
            "Jensen-Shannon divergence in between is a mixture already: leave `skew` at 0."
        )
