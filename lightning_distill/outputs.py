"""What a network said about a batch, and what a loss term gets to see."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_distill.top_k import TopK

UNLABELLED = -100
"""Class index of an item without a label; torch's and transformers' ``ignore_index``."""


class Outputs:
    """What one network said about one batch.

    Args:
        logits: Unnormalised scores, shape ``(items..., C)`` (``(B, D)`` predictions for a regression).
        features: Tapped activations by tap name; attention maps have the shape ``(B, heads, queries, keys)``.
        hidden: Last hidden state, shape ``(items..., d)``. With ``head`` it stands for ``logits``, which are
            then computed when somebody asks and not before.
        head: Maps ``hidden`` to logits.
        top_k: The largest logits and the mass of the others, where nothing more is known; see
            :class:`~lightning_distill.losses.TopKTargets`.

    Raises:
        ValueError: If there are neither ``logits``, nor both of ``hidden`` and ``head``, nor ``top_k``.
    """

    def __init__(
        self,
        logits: Tensor | None = None,
        *,
        features: Mapping[str, Tensor] | None = None,
        hidden: Tensor | None = None,
        head: Callable[[Tensor], Tensor] | None = None,
        top_k: TopK | None = None,
    ) -> None:
        if logits is None and (hidden is None or head is None) and top_k is None:
            raise ValueError("`Outputs` needs `logits`, or both of `hidden` and `head` to compute them from.")
        self._logits = logits
        self.features = dict(features or {})
        self.hidden = hidden
        self.head = head
        self.top_k = top_k

    @property
    def logits(self) -> Tensor:
        """Unnormalised scores, shape ``(items..., C)``; computed once from ``hidden`` where they were not given.

        Raises:
            ValueError: If only the largest logits are known.
        """
        if self._logits is None:
            self._logits = self._project(slice(None))
        return self._logits

    @property
    def has_logits(self) -> bool:
        """Whether ``logits`` exist already, that is, cost nothing to read."""
        return self._logits is not None

    def chunks(self, elements: int = 2**26) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the logits with at most ``elements`` numbers, each with the slice of the items that it holds.

        Logits that exist are one part; those that do not are computed part by part and not kept.
        """
        weight = getattr(self.head, "weight", None)
        if self._logits is not None or self.hidden is None or weight is None:
            yield slice(None), self.logits
            return
        rows = max(elements * len(self.hidden) // max(math.prod(self.item_shape) * len(weight), 1), 1)
        for start in range(0, len(self.hidden), rows):
            part = slice(start, start + rows)
            yield part, self.logits_of(part)

    def logits_of(self, part: slice) -> Tensor:
        """Logits of some of the items, along the first dimension; computed for them alone where there are none yet."""
        if self._logits is not None:
            return self._logits[part]
        return self._project(part)

    @property
    def item_shape(self) -> torch.Size:
        """Shape of the items (samples, or tokens): that of the logits without the class dimension."""
        source = self._logits if self._logits is not None else self.hidden
        if source is None:
            assert self.top_k is not None
            source = self.top_k.ids
        return source.shape[:-1]

    def _project(self, part: slice) -> Tensor:
        if self.hidden is None or self.head is None:
            assert self.top_k is not None
            raise ValueError(
                f"The logits of all {self.top_k.classes} classes are asked for, but the teacher's cache holds the "
                f"{self.top_k.ids.shape[-1]} largest (`kind='top_k'`). Use the loss term `TopKTargets` or, for "
                "language models, `SparseKD`, as `KD(..., terms={'soft': TopKTargets()})`; or write the cache with "
                "`kind='dense'` or `kind='hidden'`."
            )
        return self.head(self.hidden[part])


@dataclass
class Step:
    """One batch as the loss terms see it.

    Attributes:
        batch: The batch as the data loader made it, after transfer to the device.
        student: What the student said.
        teacher: What the teacher said; ``None`` in a control run without one.
        labels: Class indices of the item shape, :data:`UNLABELLED` where there is none; or class probabilities
            of the item shape plus ``(C,)``; or regression targets. ``None`` if the batch has no labels at all.
        mask: Which items count (padding does not), boolean, of the item shape; ``None`` if all do.
        positions: Which positions of a sequence count, boolean, shape ``(B, T)``; ``None`` where samples are no
            sequences. Features along a sequence are compared there.
        token_items: Whether an item is one of those positions (a token), and not a sample.
        temperature: Of the distillation; a number, or one value per item.
        index: Identity of each sample in its data set, shape ``(B,)``, where the data module gives it.
        step: Optimizer steps done so far.
        epoch: Epochs done so far.
        progress: Fraction of the training done, in [0, 1].
    """

    batch: Any
    student: Outputs
    teacher: Outputs | None = None
    labels: Tensor | None = None
    mask: Tensor | None = None
    positions: Tensor | None = None
    token_items: bool = False
    temperature: float | Tensor = 1.0
    index: Tensor | None = None
    step: int = 0
    epoch: int = 0
    progress: float = 0.0
    extras: dict[str, Any] = field(default_factory=dict)


class StepRule(Protocol):
    """A function of the step: a temperature, or the weights of its items.

    It returns a number or a tensor with one per item; ``Any`` here lets the command line accept rules that return
    only one of the two.
    """

    def __call__(self, step: Step) -> Any:
        """A number, or one per item."""
