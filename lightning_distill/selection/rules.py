"""Rules that choose the items from which the student learns: ``item_weights={"soft": SelectByEntropy(0.5)}``.

An item that is chosen has the weight ``weight``, another one 0, and both count in the mean. The loss on the chosen
items is therefore as it was; ``weight=10`` makes up for the choice of a tenth. (A mean over the chosen items alone
would depend on how they happen to be split over micro-batches and processes.)
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.outputs import UNLABELLED, Outputs, Step
from lightning_distill.rules import OverRanks, StatefulRule
from lightning_distill.selection.histogram import BINS, count_entropies, histogram_quantile
from lightning_distill.selection.report import SelectionReport, report_of_counts, selection_counts
from lightning_distill.selection.uncertainty import (
    class_of_items,
    item_entropy,
    percentile_threshold,
    require_classes,
    require_not_negative,
    require_percentile,
)

Source = Literal["student", "teacher"]
Keep = Literal["above", "below"]
MOST_CLASSES = 10_000
"""Of more classes than this, as vocabularies have, the report does not count each."""


_NUMBERS = itertools.count()  # an id() may come up again


class Selection(StatefulRule):
    """What the rules that select items by their entropy share; a subclass says where the threshold is.

    Args:
        source: Whose prediction, at temperature 1, the entropy is taken of: the ``"student"``'s or the ``"teacher"``'s.
        keep: Learn from the items ``"above"`` the threshold (of which the network is unsure), or from those not above
            it, ``"below"``.
        weight: Of a chosen item, positive.

    Attributes:
        counts: What was selected since the last :meth:`reset`, see
            :func:`~lightning_distill.selection.selection_counts`; the same in all processes. ``None`` before the
            first step.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(self, *, source: Source = "student", keep: Keep = "above", weight: float = 1.0) -> None:
        super().__init__()
        if source not in ("student", "teacher"):
            raise ValueError(f"`source` must be 'student' or 'teacher', got {source!r}.")
        if keep not in ("above", "below"):
            raise ValueError(f"`keep` must be 'above' or 'below', got {keep!r}.")
        if not 0 < weight < math.inf:
            raise ValueError(f"`weight` must be positive, got {weight}.")
        self.source = source
        self.keep = keep
        self.weight = float(weight)
        self.counts: Tensor | None = None
        self._key = f"selection {next(_NUMBERS)}"
        self._pending: Tensor | None = None

    def bound(self, entropy: Tensor, step: Step) -> Tensor | float:
        """Threshold in nats: a number, or one per item."""
        raise TypeError(f"{type(self).__name__} is a `Selection` without a `bound(entropy, step)`; define one.")

    def collect(self, entropy: Tensor, step: Step) -> None:
        """Take in the entropies of a training batch; by default nothing is remembered."""

    def forward(self, step: Step) -> Tensor:
        """Weight of each item of ``step``, shape of the items; computed once for all the terms that it is a rule of."""
        known: Tensor | None = step.extras.get(self._key)
        if known is not None:
            return known
        outputs = self._source(step)
        entropy = item_entropy(outputs)
        with torch.no_grad():
            above = entropy > self.bound(entropy, step)
            selected = above if self.keep == "above" else ~above
            if self.training:
                self.collect(entropy, step)
                self._count(selected, step, outputs)
            weights = step.extras[self._key] = selected * self.weight
            return weights

    def end_step(self, over_ranks: OverRanks | None) -> None:
        """Add up what was selected in this optimizer step, over all processes."""
        if self._pending is None:
            return
        found = self._pending if over_ranks is None else over_ranks(self._pending) * _processes()
        self.counts = found if self.counts is None else self.counts.to(found.device) + found
        self._pending = None

    def report(self) -> SelectionReport | None:
        """What was selected since the last :meth:`reset`; ``None`` before the first step."""
        return None if self.counts is None else report_of_counts(self.counts)

    def reset(self) -> None:
        """Begin to count anew."""
        self.counts = None

    def _all_at_first(self, bound: Tensor, counted: Tensor) -> Tensor:
        """``bound``, or, as long as nothing is ``counted``, one that chooses every item."""
        return torch.where(counted.any(), bound, -math.inf if self.keep == "above" else math.inf)

    def _source(self, step: Step) -> Outputs:
        if self.source == "student":
            return step.student
        if step.teacher is None:
            raise ValueError(
                f"{type(self).__name__}(source='teacher') reads the teacher's logits, but there is no teacher. Pass "
                "`teacher=...` to the module, or choose `source='student'`."
            )
        return step.teacher

    def _count(self, selected: Tensor, step: Step, outputs: Outputs) -> None:
        classes = _number_of_classes(outputs)
        labels = step.labels
        if labels is None or labels.shape != selected.shape or labels.is_floating_point() or classes > MOST_CLASSES:
            labels, classes = None, 0
        found = selection_counts(selected, labels, classes, mask=step.mask)
        self._pending = found if self._pending is None else self._pending + found


class SelectByEntropy(Selection):
    """Rule: learn from items whose entropy is above ``threshold`` (or, with ``keep="below"``, not above it).

    Learning where the student is unsure follows the idea of Xu, Liu and Loy (2023),
    "Computation-efficient knowledge distillation via uncertainty-aware mixup".

    Args:
        threshold: Nats, not negative; ``log C`` is the highest entropy there is.
        source: See :class:`Selection`, as for the arguments below.
        keep: See :class:`Selection`.
        weight: See :class:`Selection`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self, threshold: float, *, source: Source = "student", keep: Keep = "above", weight: float = 1.0
    ) -> None:
        super().__init__(source=source, keep=keep, weight=weight)
        require_not_negative(threshold=threshold)
        self.threshold = float(threshold)

    def bound(self, entropy: Tensor, step: Step) -> float:
        """The constant."""
        return self.threshold


class SelectByPercentile(Selection):
    """Rule: learn from items whose entropy is above the ``q``-th percentile *of their batch*.

    The percentile is that of the micro-batch of one process, so the choice depends on how a step is split, and of a
    batch of ten items with ``q=90`` one is chosen, however unsure of all the network may be.
    :class:`SelectByRunningPercentile` has neither property.

    Args:
        q: In [0, 100]; 90 chooses the tenth of which the network is least sure.
        source: See :class:`Selection`, as for the arguments below.
        keep: See :class:`Selection`.
        weight: See :class:`Selection`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self, q: float = 90.0, *, source: Source = "student", keep: Keep = "above", weight: float = 1.0
    ) -> None:
        super().__init__(source=source, keep=keep, weight=weight)
        require_percentile(q)
        self.q = q

    def bound(self, entropy: Tensor, step: Step) -> Tensor:
        """The percentile of the items that count."""
        return percentile_threshold(entropy, self.q, mask=step.mask)


class SelectByRunningPercentile(Selection):
    """Rule: learn from items whose entropy is above the ``q``-th percentile of the optimizer steps before this one.

    A histogram of the entropies is kept, in which older steps count less and less. The choice in a step depends on
    earlier steps alone, hence not on how a step is split over micro-batches and processes. Every item of the first
    step is chosen.

    Args:
        q: In [0, 100].
        momentum: What is left of the old counts after a step, in [0, 1): 0.9 looks back about ten steps, 0 one step.
        source: See :class:`Selection`, as for the arguments below.
        keep: See :class:`Selection`.
        weight: See :class:`Selection`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    histogram: Tensor
    _seen: Tensor

    def __init__(
        self,
        q: float = 90.0,
        momentum: float = 0.9,
        *,
        source: Source = "student",
        keep: Keep = "above",
        weight: float = 1.0,
    ) -> None:
        super().__init__(source=source, keep=keep, weight=weight)
        require_percentile(q)
        _require_momentum(momentum)
        self.q = q
        self.momentum = momentum
        self.register_buffer("histogram", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("_seen", torch.zeros(BINS, dtype=torch.float64), persistent=False)

    def bound(self, entropy: Tensor, step: Step) -> Tensor:
        """The percentile so far."""
        return self._all_at_first(histogram_quantile(self.histogram, self.q), self.histogram)

    def collect(self, entropy: Tensor, step: Step) -> None:
        """Count the entropies of the items that count."""
        self._seen += count_entropies(entropy if step.mask is None else entropy[step.mask])

    def end_step(self, over_ranks: OverRanks | None) -> None:
        """Let the old counts fade and add the new ones."""
        super().end_step(over_ranks)
        self.histogram.mul_(self.momentum).add_(_sum(self._seen, over_ranks))
        self._seen.zero_()


class SelectByVariance(Selection):
    r"""Rule: learn from items whose entropy is above :math:`\tau_0 (1 + \beta \mathrm{Var})`.

    The variance is that of the entropies of the optimizer steps before this one, so that the choice does not depend on
    how a step is split; see :func:`~lightning_distill.selection.dynamic_threshold` for that of one batch. In the first
    step it is 0. The threshold is at most ``log C``.

    Args:
        tau0: Threshold for items that are all alike, not negative, nats.
        beta: Growth per nat², not negative.
        momentum: What is left of the old sums after a step, in [0, 1).
        source: See :class:`Selection`, as for the arguments below.
        keep: See :class:`Selection`.
        weight: See :class:`Selection`.

    Raises:
        ValueError: If an argument is outside its range.
    """

    sums: Tensor
    _seen: Tensor

    def __init__(
        self,
        tau0: float = 0.5,
        beta: float = 1.0,
        momentum: float = 0.9,
        *,
        source: Source = "student",
        keep: Keep = "above",
        weight: float = 1.0,
    ) -> None:
        super().__init__(source=source, keep=keep, weight=weight)
        require_not_negative(tau0=tau0, beta=beta)
        _require_momentum(momentum)
        self.tau0 = tau0
        self.beta = beta
        self.momentum = momentum
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))  # of 1, u and u² over the items
        self.register_buffer("_seen", torch.zeros(3, dtype=torch.float64), persistent=False)

    def bound(self, entropy: Tensor, step: Step) -> Tensor:
        """The threshold from the variance so far."""
        n, total, squares = self.sums / self.sums[0].clamp_min(1e-300)
        variance = (squares - total.square()).clamp_min(0) * n
        highest = math.log(max(_number_of_classes(self._source(step)), 2))
        bound: Tensor = self.tau0 * (1 + self.beta * variance)
        return bound.clamp_max(highest)

    def collect(self, entropy: Tensor, step: Step) -> None:
        """Add up the entropies of the items that count, and their squares."""
        values = (entropy if step.mask is None else entropy[step.mask]).double()
        self._seen += torch.stack([values.new_tensor(values.numel()), values.sum(), values.square().sum()])

    def end_step(self, over_ranks: OverRanks | None) -> None:
        """Let the old sums fade and add the new ones."""
        super().end_step(over_ranks)
        self.sums.mul_(self.momentum).add_(_sum(self._seen, over_ranks))
        self._seen.zero_()


class SelectByClass(Selection):
    """Rule: learn from items whose entropy is above the running ``q``-th percentile *of their class*.

    Each class keeps about the same share of its items, also one that the network finds easy. The class of an item is
    its label or, for an item without one, the teacher's decision. As :class:`SelectByRunningPercentile` in all else.

    Args:
        classes: Number of classes ``K``.
        q: In [0, 100].
        momentum: What is left of the old counts after a step, in [0, 1).
        min_count: A class of which fewer items are remembered gets the percentile of all items; at least 1.
        source: See :class:`Selection`, as for the arguments below.
        keep: See :class:`Selection`.
        weight: See :class:`Selection`.

    Raises:
        ValueError: If an argument is outside its range; at a step that has neither labels nor a teacher.
    """

    histogram: Tensor
    _seen: Tensor

    def __init__(
        self,
        classes: int,
        q: float = 90.0,
        momentum: float = 0.9,
        min_count: int = 10,
        *,
        source: Source = "student",
        keep: Keep = "above",
        weight: float = 1.0,
    ) -> None:
        super().__init__(source=source, keep=keep, weight=weight)
        require_percentile(q)
        _require_momentum(momentum)
        require_classes(classes, min_count)
        self.q = q
        self.momentum = momentum
        self.min_count = min_count
        # the last row counts the items without a class
        self.register_buffer("histogram", torch.zeros(classes + 1, BINS, dtype=torch.float64))
        self.register_buffer("_seen", torch.zeros(classes + 1, BINS, dtype=torch.float64), persistent=False)

    @property
    def thresholds(self) -> Tensor:
        """Threshold of each class and, last, of items without one, shape ``(K + 1,)``; minus infinity at first."""
        general = histogram_quantile(self.histogram.sum(dim=0), self.q)
        own = histogram_quantile(self.histogram, self.q)
        rare = self.histogram.sum(dim=-1) < self.min_count
        rare[-1] = True
        return torch.where(rare, general, own)

    def bound(self, entropy: Tensor, step: Step) -> Tensor:
        """The threshold of each item's class."""
        return self._all_at_first(self.thresholds, self.histogram)[self._rows(step, entropy)]

    def collect(self, entropy: Tensor, step: Step) -> None:
        """Count the entropies of the items that count, class by class."""
        rows = self._rows(step, entropy)
        if step.mask is not None:
            entropy, rows = entropy[step.mask], rows[step.mask]
        self._seen += count_entropies(entropy, rows, len(self._seen))

    def end_step(self, over_ranks: OverRanks | None) -> None:
        """Let the old counts fade and add the new ones."""
        super().end_step(over_ranks)
        self.histogram.mul_(self.momentum).add_(_sum(self._seen, over_ranks))
        self._seen.zero_()

    def _rows(self, step: Step, entropy: Tensor) -> Tensor:
        """Row of the histogram for each item."""
        key = f"classes of {self._key}"
        known: Tensor | None = step.extras.get(key)
        if known is not None:
            return known
        labels = class_of_items(step.labels, step.teacher)
        if labels is None:
            raise ValueError("SelectByClass needs labels or a teacher to tell the classes of the items; there is none.")
        if labels.shape != entropy.shape:
            raise ValueError(
                f"SelectByClass needs one class per item, got classes of shape {tuple(labels.shape)} for items of "
                f"shape {tuple(entropy.shape)}."
            )
        last = len(self.histogram) - 1
        highest = int(labels.max()) if labels.numel() > 0 else 0
        if highest >= last:
            raise ValueError(f"`classes` of SelectByClass is {last}, but an item has the class {highest}.")
        rows = step.extras[key] = torch.where(labels == UNLABELLED, last, labels)
        return rows


def _require_momentum(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")


def _number_of_classes(outputs: Outputs) -> int:
    """Classes of the prediction, without computing logits that do not exist yet; 0 if only they would tell."""
    if outputs.has_logits:
        return outputs.logits.shape[-1]
    weight = getattr(outputs.head, "weight", None)
    return len(weight) if weight is not None else 0


def _sum(value: Tensor, over_ranks: OverRanks | None) -> Tensor:
    return value if over_ranks is None else over_ranks(value) * _processes()


def _processes() -> int:
    return torch.distributed.get_world_size()
