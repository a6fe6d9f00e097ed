"""Distances with parameters of their own, trained with the student and left behind at export."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distill.losses.distances.inputs import same_shape, samples, unit, upcast
from lightning_distill.losses.lazy import Lazy, Shape


def gaussian_nll(mean: Tensor, target: Tensor, variance: Tensor) -> Tensor:
    """Negative log-likelihood of ``target`` under independent normal distributions, mean over channels, nats.

    Without the constant ``log(2 pi) / 2``: VID of Ahn et al. (2019), equation 5, https://arxiv.org/abs/1904.05835.

    Args:
        mean: Shape ``(..., d)``: the (transformed) student; gets a gradient, as ``variance`` does.
        target: Same shape: the teacher; detached here.
        variance: Of each channel, positive, shape ``(d,)``.

    Returns:
        Shape ``(...)``, in float32 or wider; may be negative where the variance is below one.

    Raises:
        ValueError: If the shapes differ.
    """
    mean, target = same_shape(mean, target)
    variance = variance.to(mean.dtype)
    return 0.5 * ((mean - target).square() / variance + variance.log()).mean(dim=-1)


class VID(Lazy):
    """:func:`gaussian_nll` with a learned variance for each channel: variational information distillation.

    What the student cannot predict gets a large variance and so a small weight.

    Args:
        initial_variance: To begin with, larger than ``smallest``; the authors' 5.
        smallest: Lower limit of the variances.

    Raises:
        ValueError: If the variances are not ``0 < smallest < initial_variance``.
    """

    def __init__(self, initial_variance: float = 5.0, smallest: float = 1e-5) -> None:
        super().__init__()
        if not 0 < smallest < initial_variance:
            raise ValueError(
                "`initial_variance` must be larger than `smallest`, and both positive, got "
                f"{initial_variance} and {smallest}."
            )
        self.initial_variance = initial_variance
        self.smallest = smallest

    def make(self, *shapes: Shape) -> None:
        """A variance for each channel of the teacher."""
        start = math.log(math.expm1(self.initial_variance - self.smallest))
        self.raw_variance = nn.Parameter(torch.full((shapes[1][-1],), start))

    @property
    def variance(self) -> Tensor:
        """Variance of each channel, shape ``(d_T,)``."""
        return F.softplus(self.raw_variance.float()) + self.smallest

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """One value per position, ``(B, *P)``."""
        return gaussian_nll(student, teacher, self.variance)


def critic_loss(similarity: Tensor, *, temperature: float, noise: float) -> Tensor:
    r"""Loss of a critic that tells pairs of the same sample from pairs of two: CRD of Tian et al. (2020).

    .. math:: -\log h_{ii} - \sum_{j \ne i} \log(1 - h_{ij}), \qquad h = \frac{e^{s / \tau}}{e^{s / \tau} + c}

    Equations 17 to 19 of https://arxiv.org/abs/1910.10699, with the other samples of the batch as negatives.

    Args:
        similarity: Of each student to each teacher, shape ``(B, B)``; the diagonal holds the pairs.
        temperature: ``tau``, positive.
        noise: ``c``, positive; the paper's number of negatives over the number of samples.

    Returns:
        Shape ``(B,)``.
    """
    logits = similarity / temperature - math.log(noise)  # h is the sigmoid of this
    pairs = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return -F.logsigmoid(torch.where(pairs, logits, -logits)).sum(dim=-1)


class CRD(Lazy):
    """Contrastive representation distillation within the batch: :func:`critic_loss` of two learned projections.

    The authors keep a memory of all samples for their 16384 negatives; here the batch serves, so no sample needs an
    identity. :class:`~lightning_distill.losses.InfoNCE` is the variant that classifies instead of telling pairs apart.
    It compares samples: sequences and maps are pooled over their positions, and the value depends on the batch size.

    Args:
        width: Of the projections; the authors' 128.
        temperature: Positive; the authors' 0.07.
        noise: See :func:`critic_loss`; by default the number of negatives over the batch size.

    Raises:
        ValueError: If an argument is not positive.
    """

    def __init__(self, width: int = 128, temperature: float = 0.07, noise: float | None = None) -> None:
        super().__init__()
        for name, value in {"width": width, "temperature": temperature, "noise": noise}.items():
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        self.width = width
        self.temperature = temperature
        self.noise = noise

    def make(self, *shapes: Shape) -> None:
        """A projection for each side."""
        self.student_projection, self.teacher_projection = (nn.Linear(shape[-1], self.width) for shape in shapes)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar, mean over the samples that count."""
        student, teacher = samples(student, teacher, mask)
        with torch.autocast(student.device.type, enabled=False):
            ours, _ = upcast(unit(self.student_projection(student)), student)
            similarity = ours @ unit(self.teacher_projection(teacher)).T
        number = len(similarity)
        if number < 2:  # nobody to be told from; a graph to all parameters all the same
            return similarity.sum() * 0
        noise = (number - 1) / number if self.noise is None else self.noise
        return critic_loss(similarity, temperature=self.temperature, noise=noise).mean()
