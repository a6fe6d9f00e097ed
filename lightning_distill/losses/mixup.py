"""Mixup: train on blends of two samples, which teacher and student both see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.outputs import UNLABELLED


def mixup(inputs: Tensor, targets: Tensor, permutation: Tensor, *, lam: float) -> tuple[Tensor, Tensor]:
    r"""Blend each sample with another one of the batch.

    .. math:: \tilde x_i = \lambda x_i + (1 - \lambda) x_{\pi(i)}, \qquad
        \tilde y_i = \lambda y_i + (1 - \lambda) y_{\pi(i)}

    Zhang et al. (2018), https://arxiv.org/abs/1710.09412.

    Args:
        inputs: Real-valued, shape ``(B, ...)``.
        targets: Class probabilities ``(B, C)``, or regression targets.
        permutation: ``pi``, indices of shape ``(B,)``.
        lam: In [0, 1]; 1 changes nothing.

    Returns:
        Blended inputs and targets, of the same shapes and types.

    Raises:
        ValueError: If ``lam`` is outside [0, 1].
        TypeError: If ``inputs`` or ``targets`` are not floating-point.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.eye(2)
        >>> mixup(x, y, torch.tensor([1, 0]), lam=0.75)
        (tensor([[0.2500],
                [0.7500]]), tensor([[0.7500, 0.2500],
                [0.2500, 0.7500]]))
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"`lam` must be in [0, 1], got {lam}.")
    for name, value in {"inputs": inputs, "targets": targets}.items():
        if not value.is_floating_point():
            raise TypeError(
                f"`{name}` must be floating-point to be blended, got {value.dtype}. Class indices become probabilities "
                "by `torch.nn.functional.one_hot(labels, num_classes).float()`; token ids cannot be blended."
            )
    return torch.lerp(inputs[permutation], inputs, lam), torch.lerp(targets[permutation], targets, lam)


def one_hot(labels: Tensor, *, num_classes: int) -> Tensor:
    """Class probabilities of ``labels`` in float32, shape ``(B, num_classes)``; all zero for items labelled ``-100``.

    Example:
        >>> one_hot(torch.tensor([1, -100]), num_classes=2)
        tensor([[0., 1.],
                [0., 0.]])
    """
    labelled = labels != UNLABELLED
    return F.one_hot(labels.clamp_min(0), num_classes).float() * labelled.unsqueeze(-1)


class Mixup:
    """Blends the samples of each training batch; pass it as ``batch_transform``.

    The blend is made once, before teacher and student run, so that the teacher speaks about what the student sees
    (Beyer et al. 2022, "consistent teaching"). One ``lam`` is drawn per batch from ``Beta(alpha, alpha)``.

    Labels become class probabilities ``(B, C)``. An item labelled ``-100`` is blended as well, and its label counts as
    all zeros: the probabilities of a blend then add up to the labelled share, and its cross-entropy is that share of
    the cross-entropy of the labelled sample. All-unlabelled blends add nothing to terms on labels, as without mixup.
    (With label smoothing use probabilities that add up to 1: it assumes that they do.)

    The batch is a tuple ``(inputs, labels)`` or a mapping. The samples' ``index`` is left out of the result: a blend
    has none, and what is stored for a sample under its index is not about the blend.

    Args:
        alpha: Of the Beta distribution, positive; 0.1 to 0.4 are usual.
        num_classes: Number of classes ``C``, for labels that are class indices.
        input_key: Key of the inputs if the batch is a mapping.
        label_key: Key of the labels if the batch is a mapping.

    Raises:
        ValueError: If ``alpha`` is not positive and finite, or ``num_classes`` not positive.

    Example:
        >>> x, y = Mixup(alpha=0.2, num_classes=3)((torch.randn(4, 2), torch.tensor([0, 1, 2, 1])))
        >>> x.shape, y.shape, y.sum(dim=-1)
        (torch.Size([4, 2]), torch.Size([4, 3]), tensor([1., 1., 1., 1.]))
    """

    def __init__(self, alpha: float = 0.2, *, num_classes: int, input_key: str = "x", label_key: str = "y") -> None:
        if not 0 < alpha < math.inf:
            raise ValueError(f"`alpha` must be positive and finite, got {alpha}.")
        if not num_classes > 0:
            raise ValueError(f"`num_classes` must be positive, got {num_classes}.")
        self.alpha = alpha
        self.num_classes = num_classes
        self.input_key = input_key
        self.label_key = label_key
        self._beta = torch.distributions.Beta(alpha, alpha)

    def __call__(self, batch: Any) -> Any:
        """The blended batch: a tuple ``(inputs, probabilities)``, or a mapping with the other entries unchanged.

        Raises:
            ValueError: If the batch is a mapping without one of the keys, or a class index is too large.
            TypeError: If the batch is neither, or its inputs are not floating-point.
        """
        if isinstance(batch, Mapping):
            for argument, key in {"input_key": self.input_key, "label_key": self.label_key}.items():
                if key not in batch:
                    raise ValueError(
                        f"The batch has no {key!r}: its keys are {list(batch)}. Name it: `{argument}=...`."
                    )
            inputs, labels = self._mix(batch[self.input_key], batch[self.label_key])
            others = {key: value for key, value in batch.items() if key != "index"}
            return others | {self.input_key: inputs, self.label_key: labels}
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise TypeError(f"Mixup expects a batch (inputs, labels) or a mapping, got {type(batch).__name__}.")
        return self._mix(batch[0], batch[1])

    def _mix(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not labels.is_floating_point():
            labels = one_hot(labels, num_classes=self.num_classes)
        permutation = torch.randperm(len(inputs), device=inputs.device)
        return mixup(inputs, labels, permutation, lam=float(self._beta.sample()))
