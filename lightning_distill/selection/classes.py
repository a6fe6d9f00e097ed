"""Train on some of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distill.outputs import Step


class OnlyClasses:
    """Item weights: 1 for items whose label is among ``classes``, 0 for the others and for those without a label.

    Under ``item_weights: {"*": OnlyClasses([0, 1])}`` a network becomes a specialist: it has outputs for all classes,
    and never learns from the others.

    Args:
        classes: Class indices, not negative, at least one.

    Raises:
        ValueError: If there are none or one is negative; when called, if labels are missing or no class indices.

    Example:
        >>> OnlyClasses([2, 3]).classes
        (2, 3)
    """

    def __init__(self, classes: Sequence[int]) -> None:
        if len(classes) == 0 or min(classes) < 0:
            raise ValueError(f"`classes` must be class indices, at least one, none negative, got {list(classes)}.")
        self.classes = tuple(classes)

    def __call__(self, step: Step) -> Tensor:
        """Shape of the labels, float32."""
        if step.labels is None or step.labels.is_floating_point():
            raise ValueError("`OnlyClasses` reads class indices, but the batch has no labels or other ones.")
        return torch.isin(step.labels, torch.tensor(self.classes, device=step.labels.device)).float()
