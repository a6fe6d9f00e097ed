"""When to leave a network early: confidences, thresholds, and what they cost and keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import softened_log_softmax

Criterion = Literal["max_prob", "entropy", "margin"]
CRITERIA = ("max_prob", "entropy", "margin")
LEVELS = 101
"""Candidate thresholds per exit that calibration tries."""


def exit_confidence(logits: Tensor, criterion: Criterion = "max_prob") -> Tensor:
    r"""How sure a classifier is of each sample, in [0, 1].

    Args:
        logits: Unnormalised scores, shape ``(..., C)``.
        criterion: ``"max_prob"``, the largest probability; ``"entropy"``, ``1 - H / log C``, as BranchyNet
            (Teerapittayanon et al. 2016) thresholds it; or ``"margin"``, the largest probability minus the second.

    Returns:
        Shape ``(...)``, in float32 or wider; 1 throughout for a single class.

    Raises:
        ValueError: If ``criterion`` is unknown.

    Example:
        >>> exit_confidence(torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]), "margin")
        tensor([0.6805, 0.0000])
    """
    check_criterion(criterion)
    log_p = softened_log_softmax(logits)
    classes = log_p.shape[-1]
    if classes == 1:
        return torch.ones_like(log_p[..., 0])
    if criterion == "max_prob":
        return log_p.amax(dim=-1).exp()
    if criterion == "margin":
        first, second = log_p.topk(2, dim=-1).values.exp().unbind(dim=-1)
        return first - second
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return (1 - entropy / math.log(classes)).clamp(0, 1)


def exit_indices(confidences: Tensor, thresholds: Sequence[float] | Tensor) -> Tensor:
    """Where each sample leaves: the first exit whose confidence is above its threshold, else the network's end.

    Args:
        confidences: Of each auxiliary exit, in order, shape ``(N, E)``.
        thresholds: One number per exit. 1 and more is never reached, and everybody passes a negative one.

    Returns:
        Shape ``(N,)``, from 0 to ``E``; ``E`` is the network's own output, which always takes whoever comes.

    Raises:
        ValueError: If there are not as many thresholds as exits.

    Example:
        >>> exit_indices(torch.tensor([[0.5, 0.9], [0.95, 0.1], [0.1, 0.2]]), [0.8, 0.8])
        tensor([1, 0, 2])
    """
    limits = torch.as_tensor(thresholds, dtype=confidences.dtype, device=confidences.device)
    if limits.shape != confidences.shape[1:]:
        raise ValueError(
            f"`thresholds` must be one number for each of the {confidences.shape[1]} exits, got {limits.numel()}."
        )
    ends = torch.ones(len(confidences), 1, dtype=torch.bool, device=confidences.device)
    return torch.cat([confidences > limits, ends], dim=1).long().argmax(dim=1)


@dataclass(frozen=True)
class ExitReport:
    """What early exits do on some data.

    Attributes:
        names: Of the exits; the last is the network's own output.
        thresholds: Of all but the last.
        shares: Share of the samples that leave at each exit.
        accuracies: Of each exit on the samples that leave there; NaN where there are none.
        accuracy: Of all samples where they leave.
        full_accuracy: Of the whole network, or the last of a cascade, on all samples.
        cost: Mean of a sample. Of early exits floating-point operations, heads included, where a multiply-add counts as
            two; of a cascade the passes of all networks that saw the sample.
        full_cost: Of the network without heads, or of the last of a cascade alone.
        samples: Number of samples.
        sub_batches: Whether the later layers of a batch get only the samples that are left; ``None`` if not known.
        whole: What stands at the last exit, for the text.
        unit: Of the cost, for the text.
        bits: Of a weight behind each exit, where they differ.
    """

    names: tuple[str, ...]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...]
    accuracies: tuple[float, ...]
    accuracy: float
    full_accuracy: float
    cost: float
    full_cost: float
    samples: int
    sub_batches: bool | None = None
    whole: str = "whole network"
    unit: str = "operations"
    bits: tuple[float, ...] | None = None

    @property
    def relative_cost(self) -> float:
        """``cost / full_cost``: above 1 where the heads, or the first networks, cost more than they save."""
        return self.cost / self.full_cost

    @property
    def average_bits(self) -> float:
        """Bits of a weight of whoever answers, mean over the samples; NaN where they are not known."""
        if self.bits is None:
            return math.nan
        return math.fsum(share * bits for share, bits in zip(self.shares, self.bits, strict=True))

    @property
    def never_taken(self) -> tuple[str, ...]:
        """Exits before the end at which no sample leaves."""
        return tuple(name for name, share in zip(self.names[:-1], self.shares, strict=False) if share == 0)

    def __str__(self) -> str:
        width = max(map(len, (*self.names, "exit")))
        lines = [f"{'exit':{width}}  threshold  leave here  accuracy there"]
        for name, threshold, share, accuracy in zip(
            self.names, (*self.thresholds, None), self.shares, self.accuracies, strict=True
        ):
            limit = "" if threshold is None else "never" if threshold == math.inf else f"{threshold:.4f}"
            there = "" if math.isnan(accuracy) else f"{accuracy:.2%}"
            lines.append(f"{name:{width}}  {limit:>9}  {share:>10.1%}  {there:>14}")
        lines.append(
            f"accuracy {self.accuracy:.2%} ({self.whole} {self.full_accuracy:.2%}), {self.unit} "
            f"{self.relative_cost:.1%} of the {self.whole}'s, {self.samples} samples"
        )
        if self.bits is not None:
            lines.append(f"{self.average_bits:.2f} bits per weight of whoever answers, mean over the samples")
        if self.sub_batches is not None:
            lines.append(
                "of a batch, later layers get the samples that are left"
                if self.sub_batches
                else "a batch stops when its last sample may: later layers cannot do with a part of it"
            )
        return "\n".join(lines)


def exit_report(
    confidences: Tensor,
    correct: Tensor,
    costs: Sequence[float],
    thresholds: Sequence[float],
    *,
    full_cost: float | None = None,
    names: Sequence[str] | None = None,
) -> ExitReport:
    """What given thresholds do.

    Args:
        confidences: Of the auxiliary exits, shape ``(N, E)``.
        correct: Whether each exit is right, the network's own output last; boolean, shape ``(N, E + 1)``.
        costs: Operations of a sample that leaves at each of the ``E + 1`` exits.
        thresholds: ``E`` numbers.
        full_cost: Operations of the network without heads. Default: the last of ``costs``.
        names: Of the ``E + 1`` exits. Default: numbers.

    Raises:
        ValueError: If the shapes do not fit or there is no sample.
    """
    exits = confidences.shape[1]
    if len(confidences) == 0 or correct.shape != (len(confidences), exits + 1) or len(costs) != exits + 1:
        raise ValueError(
            f"`confidences` must be (N, E) with N > 0, `correct` (N, E + 1) and `costs` E + 1 numbers, got "
            f"{tuple(confidences.shape)}, {tuple(correct.shape)} and {len(costs)}."
        )
    taken = exit_indices(confidences, thresholds)
    right = correct.gather(1, taken.unsqueeze(1)).squeeze(1).double()
    counts = torch.bincount(taken, minlength=exits + 1)
    rights = torch.zeros(exits + 1, dtype=torch.float64).index_add_(0, taken.cpu(), right.cpu())
    spent = torch.as_tensor(costs, dtype=torch.float64)[taken.cpu()]
    return ExitReport(
        names=tuple(names) if names is not None else tuple(map(str, range(exits + 1))),
        thresholds=tuple(map(float, thresholds)),
        shares=tuple((counts.double() / len(taken)).tolist()),
        accuracies=tuple((rights / counts.cpu()).tolist()),
        accuracy=right.mean().item(),
        full_accuracy=correct[:, -1].double().mean().item(),
        cost=spent.mean().item(),
        full_cost=float(costs[-1] if full_cost is None else full_cost),
        samples=len(taken),
    )


def choose_thresholds(
    confidences: Tensor,
    correct: Tensor,
    costs: Sequence[float],
    *,
    max_drop: float | None = None,
    max_cost: float | None = None,
    rounds: int = 3,
) -> list[float]:
    """Thresholds for the least cost at an accuracy, or for the best accuracy at a cost, on the data given.

    One threshold for all exits is tried first, then each is moved alone while that helps. What holds on these samples
    holds on others roughly: choose on validation data, and measure on test data.

    Args:
        confidences: See :func:`exit_report`, as for the next two.
        correct: See :func:`exit_report`.
        costs: See :func:`exit_report`.
        max_drop: Accuracy that may be lost against the whole network, in [0, 1], such as 0.01.
        max_cost: Mean operations per sample that may be spent. Exactly one of the two must be given.
        rounds: How often each threshold is moved alone.

    Returns:
        One threshold per exit; infinity for one that is not worth taking.

    Raises:
        ValueError: If not exactly one of ``max_drop`` and ``max_cost`` is given, one is outside its range, or even
            leaving at the cheapest exit costs more than ``max_cost``.
    """
    if (max_drop is None) == (max_cost is None):
        raise ValueError(f"Give exactly one of `max_drop` and `max_cost`, got {max_drop} and {max_cost}.")
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise ValueError(f"`max_drop` must be in [0, 1], got {max_drop}.")
    if max_cost is not None and not max_cost >= min(costs):
        raise ValueError(
            f"`max_cost` is {max_cost:g} operations per sample, but leaving at the cheapest exit takes {min(costs):g}. "
            "Allow more, or add a head on an earlier layer."
        )
    confidences, correct = confidences.detach().double().cpu(), correct.cpu()
    spent = torch.as_tensor(costs, dtype=torch.float64)
    least = int(correct[:, -1].sum()) - (max_drop or 0.0) * len(correct)

    def score(thresholds: Sequence[float]) -> tuple[bool, float, float]:
        """Whether the condition holds, and what is better is larger."""
        taken = exit_indices(confidences, thresholds)
        right, cost = int(correct.gather(1, taken.unsqueeze(1)).sum()), spent[taken].mean().item()
        if max_cost is None:
            return right >= least - 1e-9, -cost, right
        return cost <= max_cost, right, -cost

    exits = confidences.shape[1]
    levels = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    candidates = [[-1.0, *torch.quantile(column, levels).tolist(), math.inf] for column in confidences.unbind(1)]
    together = sorted({value for column in candidates for value in column})
    best = max(([value] * exits for value in together), key=score)
    for _ in range(rounds):
        before = score(best)
        for exit_ in range(exits):
            moved = ([*best[:exit_], value, *best[exit_ + 1 :]] for value in candidates[exit_])
            best = max([best, *moved], key=score)
        if score(best) == before:
            break
    taken = exit_indices(confidences, best)
    return [value if bool((taken == number).any()) else math.inf for number, value in enumerate(best)]


def exit_curve(
    confidences: Tensor,
    correct: Tensor,
    costs: Sequence[float],
    *,
    full_cost: float | None = None,
    names: Sequence[str] | None = None,
    points: int = 25,
) -> list[ExitReport]:
    """Accuracy against cost, from everybody at the first exit to nobody before the end, with a threshold for all exits.

    Args:
        confidences: See :func:`exit_report`, as for the next four.
        correct: See :func:`exit_report`.
        costs: See :func:`exit_report`.
        full_cost: See :func:`exit_report`.
        names: See :func:`exit_report`.
        points: How many thresholds, at least 2.

    Raises:
        ValueError: If ``points`` is below 2, and as :func:`exit_report`.
    """
    exits = confidences.shape[1]
    return [
        exit_report(confidences, correct, costs, [threshold] * exits, full_cost=full_cost, names=names)
        for threshold in curve_thresholds(confidences, points)
    ]


def curve_thresholds(confidences: Tensor, points: int) -> list[float]:
    """Thresholds for all exits, from one that everybody passes to one that nobody does.

    Raises:
        ValueError: If ``points`` is below 2.
    """
    if not points >= 2:
        raise ValueError(f"`points` must be at least 2, got {points}.")
    levels = torch.linspace(0, 1, points - 1, dtype=torch.float64)
    inner = torch.quantile(confidences.detach().double().flatten(), levels).tolist() if confidences.numel() > 0 else []
    return [-1.0, *dict.fromkeys(inner[1:]), math.inf]


def check_criterion(criterion: str) -> None:
    """Refuse an unknown measure of confidence."""
    if criterion not in CRITERIA:
        raise ValueError(f"`criterion` must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
