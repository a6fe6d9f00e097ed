"""What to measure on a student and its teacher; sums over processes, so that the values are exact under DDP."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.regression import spearman_corrcoef
from torchmetrics.utilities import dim_zero_cat

from lightning_distill.losses.dkd import without_target
from lightning_distill.losses.soft_targets import (
    check_same_shape,
    check_temperature,
    kl_divergence,
    softened_log_softmax,
)
from lightning_distill.losses.targets import cross_entropy
from lightning_distill.outputs import UNLABELLED
from lightning_distill.temperature import softened_entropy


def dark_knowledge(logits: Tensor, labels: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    r"""What a prediction says beyond how likely its label is: the part of its entropy within the other classes.

    .. math:: H(p) = H_b(p_t) + \underbrace{(1 - p_t) \, H(\hat p)}_{\text{dark knowledge}}, \qquad
        \hat p_c = \frac{p_c}{1 - p_t}, \; c \ne t

    ``H(p)`` as a whole is no measure of it: it is at most ``log C``, which a hard label carries already.

    Args:
        logits: Unnormalised scores, shape ``(items..., C)``.
        labels: Class indices of shape ``(items...)``; the value of an item labelled ``-100`` means nothing.
        temperature: ``T > 0``; a number, or one value per item.

    Returns:
        Shape ``(items...)``, nats; 0 for a sure prediction, ``(C - 1) / C * log(C - 1)`` for a uniform one.

    Example:
        >>> dark_knowledge(torch.zeros(1, 4), torch.tensor([0]))
        tensor([0.8240])
    """
    log_p = softened_log_softmax(logits, temperature)
    if logits.shape[-1] < 2:
        return torch.zeros_like(log_p[..., 0])
    rest = without_target(log_p, labels)
    return rest.logsumexp(dim=-1).exp() * softened_entropy(rest)


class _ItemMean(Metric):
    """Mean of a value per item over everything seen; NaN before the first item."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, values: Tensor, counted: Tensor | None = None) -> None:
        if counted is not None:
            values = torch.where(counted, values, 0)
        self.total += values.sum().to(self.total.dtype)
        self.count += values.numel() if counted is None else counted.sum()

    def compute(self) -> Tensor:
        """Mean over all items seen since the last reset."""
        return self.total / self.count


class NegativeLogLikelihood(_ItemMean):
    """Mean of ``-log p(label)`` in nats; 0 is perfect, ``log C`` a uniform guess.

    Example:
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> metric.compute()
        tensor(1.3863)
    """

    is_differentiable = True
    higher_is_better = False

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits ``(items..., C)`` and class indices ``(items...)``; items labelled ``-100`` are left out."""
        self._add(cross_entropy(logits, labels), labels != UNLABELLED)


class Accuracy(_ItemMean):
    """Share of items whose most likely class is their label; for any number of classes, unlike torchmetrics' own.

    Example:
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Take in logits ``(items..., C)`` and class indices ``(items...)``; ``-100`` does not count."""
        self._add((logits.argmax(dim=-1) == labels).float(), labels != UNLABELLED)


class Agreement(_ItemMean):
    """Share of items for which student and teacher choose the same class, in [0, 1].

    Example:
        >>> metric = Agreement()
        >>> metric.update(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[9.0, 0.0], [0.0, 9.0]]))
        >>> metric.compute()
        tensor(0.5000)
    """

    is_differentiable = False
    higher_is_better = True

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Add logits of both, shape ``(items..., C)``."""
        check_same_shape(student_logits, teacher_logits)
        self._add(student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1))


class Fidelity(_ItemMean):
    """Mean forward KL divergence from teacher to student at temperature 1, in nats; 0 is a perfect copy.

    Stanton et al. (2021) show that students may generalise well at poor fidelity, so look at both.

    Example:
        >>> metric = Fidelity()
        >>> metric.update(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        >>> metric.compute()
        tensor(1.5232)
    """

    is_differentiable = True
    higher_is_better = False

    def update(self, student_logits: Tensor, teacher_logits: Tensor) -> None:
        """Add logits of both, shape ``(items..., C)``."""
        self._add(kl_divergence(student_logits, teacher_logits))


class SimilaritySpearman(Metric):
    """Rank correlation of all pairwise cosines of the student's embeddings with the teacher's, in [-1, 1].

    1 means that the student puts all pairs of samples in the teacher's order of similarity. Widths may differ. Exact
    over processes: embeddings are collected. Of more than ``max_samples`` an evenly spaced part is taken, since the
    pairs grow with the square.

    Args:
        max_samples: At least 3.

    Raises:
        ValueError: If ``max_samples`` is below 3.

    Example:
        >>> metric = SimilaritySpearman()
        >>> x = torch.randn(8, 4)
        >>> metric.update(2 * x, x)
        >>> round(metric.compute().item(), 4)
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(self, max_samples: int = 1000) -> None:
        super().__init__()
        if not max_samples >= 3:
            raise ValueError(f"`max_samples` must be at least 3, got {max_samples}: two samples are one pair.")
        self.max_samples = max_samples
        self.add_state("student", [], dist_reduce_fx="cat")
        self.add_state("teacher", [], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Add embeddings of the same samples, shapes ``(B, d_S)`` and ``(B, d_T)``."""
        self.student.append(student.detach().float())
        self.teacher.append(teacher.detach().float())

    def compute(self) -> Tensor:
        """Rank correlation over all pairs; NaN for fewer than 3 samples."""
        sides = [torch.nn.functional.normalize(dim_zero_cat(side), dim=-1) for side in (self.student, self.teacher)]
        count = len(sides[0])
        if count < 3:
            return torch.full((), torch.nan, device=sides[0].device)
        if count > self.max_samples:
            chosen = torch.linspace(0, count - 1, self.max_samples, device=sides[0].device).long()
            sides = [side[chosen] for side in sides]
        above = torch.triu_indices(len(sides[0]), len(sides[0]), offset=1, device=sides[0].device)
        ours, theirs = ((side @ side.T)[above[0], above[1]] for side in sides)
        return spearman_corrcoef(ours, theirs)


class RankCorrelation(Metric):
    """Spearman's rank correlation of predictions and labels, in [-1, 1]; exact over processes, for it keeps all values.

    Example:
        >>> metric = RankCorrelation()
        >>> metric.update(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.1, 0.5, 0.9]))
        >>> round(metric.compute().item(), 4)
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    predictions: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("predictions", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add values, shape ``(n,)`` each."""
        self.predictions.append(predictions.detach().float())
        self.labels.append(labels.detach().float())

    def compute(self) -> Tensor:
        """Rank correlation of everything seen; NaN for fewer than 2 values."""
        predictions, labels = dim_zero_cat(self.predictions), dim_zero_cat(self.labels)
        if len(labels) < 2:
            return torch.full((), torch.nan, device=labels.device)
        return spearman_corrcoef(predictions, labels)


class TeacherEntropy(_ItemMean):
    """Mean entropy of the teacher's predictions, in nats, from 0 to ``log C``.

    Args:
        temperature: At which the predictions are softened, positive.

    Raises:
        ValueError: If ``temperature`` is not positive and finite.

    Example:
        >>> metric = TeacherEntropy()
        >>> metric.update(torch.zeros(1, 4))
        >>> metric.compute()
        tensor(1.3863)
    """

    is_differentiable = True
    higher_is_better = None

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def update(self, teacher_logits: Tensor) -> None:
        """Add logits, shape ``(items..., C)``."""
        self._add(softened_entropy(teacher_logits, temperature=self.temperature))


class DarkKnowledge(_ItemMean):
    """Mean of :func:`dark_knowledge`: the teacher's information about the classes that are not the label, in nats.

    Args:
        temperature: At which the predictions are softened, positive.

    Raises:
        ValueError: If ``temperature`` is not positive and finite.

    Example:
        >>> metric = DarkKnowledge()
        >>> metric.update(torch.zeros(1, 4), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.8240)
    """

    is_differentiable = True
    higher_is_better = None

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        check_temperature(temperature)
        self.temperature = temperature

    def update(self, teacher_logits: Tensor, labels: Tensor) -> None:
        """Add logits ``(items..., C)`` and class indices ``(items...)``; items labelled ``-100`` are left out."""
        self._add(dark_knowledge(teacher_logits, labels, temperature=self.temperature), labels != UNLABELLED)
