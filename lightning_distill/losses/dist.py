"""Correlation instead of exact match: the teacher's ranking of classes and of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import check_same_shape, softened_log_softmax
from lightning_distill.losses.term import Term, reduce_items, teacher_outputs
from lightning_distill.outputs import Step


def inter_class_distance(
    student_logits: Tensor, teacher_logits: Tensor, *, temperature: float | Tensor = 1.0, scale_by_t2: bool = True
) -> Tensor:
    """Pearson distance between the softened predictions of each item, over its classes, times ``T ** 2``.

    Huang et al. (2022), DIST, section 4. One minus the correlation, so neither the spread nor the level of the
    student's probabilities need to be the teacher's.

    Args:
        student_logits: Shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Same shape; detached here.
        temperature: ``T > 0``; a number, or one value per item.
        scale_by_t2: Whether to multiply by ``T ** 2``, as the authors' code does. A correlation does not fade as the
            KL divergence does: at high ``T`` it tends to that of the logits, and the factor makes it grow as
            ``T ** 2``. Leave the factor out where the temperature changes during training.

    Returns:
        Shape ``(items...)``, in float32 or wider; before the factor from 0 to 2. Where the teacher's prediction is
        uniform it ranks nothing: 0. Where only the student's is, there is no correlation and no gradient: 1.

    Raises:
        ValueError: If the shapes differ or ``temperature`` is not positive and finite.

    Example:
        >>> inter_class_distance(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([1.8671])
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    distance = _pearson_distance(student, teacher)
    return distance * temperature**2 if scale_by_t2 else distance


def intra_class_distance(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    scale_by_t2: bool = True,
) -> Tensor:
    """Pearson distance between the probabilities of each class, over the items, mean over classes, times ``T ** 2``.

    Huang et al. (2022), DIST, section 4. It compares the items of a batch with each other: the value of a batch is not
    the mean over its parts, and depends on the batch size.

    Args:
        student_logits: Shape ``(items..., C)``; the only input that gets a gradient.
        teacher_logits: Same shape; detached here.
        temperature: ``T > 0``; a number, or one value per item, whose mean square is then the factor.
        mask: Which items count, boolean, shape ``(items...)``; ``None`` for all.
        scale_by_t2: As in :func:`inter_class_distance`.

    Returns:
        Scalar, in float32 or wider. A class to which the teacher gives the same probability throughout adds 0; with
        one item, or none, the whole is 0.

    Raises:
        ValueError: If the shapes differ or ``temperature`` is not positive and finite.

    Example:
        >>> intra_class_distance(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor(2.)
    """
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    factor = temperature**2 if scale_by_t2 else 1.0
    if isinstance(factor, Tensor):
        factor = reduce_items(factor.expand(student.shape[:-1]), mask)
    if mask is not None:
        student, teacher = student[mask], teacher[mask]
    columns = (side.reshape(-1, side.shape[-1]).T for side in (student, teacher))
    return _pearson_distance(*columns).mean() * factor


class DIST(Term):
    """``beta`` times the distance within each item plus ``gamma`` times the distance within each class.

    The authors' stand-in for the KL divergence when the teacher is much stronger than the student: Huang et al. (2022),
    https://arxiv.org/abs/2205.10536. Each item gets its own :func:`inter_class_distance` and the same
    :func:`intra_class_distance` of the batch, so their mean is the paper's loss. Because of the second part the
    gradient depends on how a batch is split; ``gamma=0`` does not.

    Args:
        beta: Weight of the distance over classes, not negative.
        gamma: Weight of the distance over the items of the batch, not negative.
        scale_by_t2: See :func:`inter_class_distance`.

    Raises:
        ValueError: If a weight is negative.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, scale_by_t2: bool = True) -> None:
        super().__init__()
        for name, value in {"beta": beta, "gamma": gamma}.items():
            if not value >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        self.beta = beta
        self.gamma = gamma
        self.scale_by_t2 = scale_by_t2

    def forward(self, step: Step) -> Tensor:
        """Distance of each item."""
        student, teacher = step.student.logits, teacher_outputs(step).logits
        t, t2 = step.temperature, self.scale_by_t2
        inter = inter_class_distance(student, teacher, temperature=t, scale_by_t2=t2)
        if self.gamma == 0:
            return self.beta * inter
        intra = intra_class_distance(student, teacher, temperature=t, mask=step.mask, scale_by_t2=t2)
        return self.beta * inter + self.gamma * intra


def _probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    check_same_shape(student_logits, teacher_logits)
    teacher = softened_log_softmax(teacher_logits.detach(), temperature).exp()
    return softened_log_softmax(student_logits, temperature).exp(), teacher


def _pearson_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus Pearson's correlation over the last dimension; 0 where ``teacher`` does not vary."""
    (student, _), (teacher, teacher_varies) = _standardized(student), _standardized(teacher)
    return torch.where(teacher_varies, 1 - (student * teacher).sum(dim=-1), 0)


def _standardized(values: Tensor) -> tuple[Tensor, Tensor]:
    """``values`` centred and of length 1, or 0 where they do not vary; and whether they do."""
    # First they are made to add up to 1: squares of tiny probabilities would vanish.
    scaled = values / values.detach().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    centred = scaled - scaled.mean(dim=-1, keepdim=True)
    length = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    # Below this the differences are rounding errors of the softmax.
    noise = 8 * torch.finfo(values.dtype).eps * torch.linalg.vector_norm(scaled.detach(), dim=-1, keepdim=True)
    varies = length > noise
    return torch.where(varies, centred / torch.where(varies, length, 1), 0), varies.squeeze(-1)
