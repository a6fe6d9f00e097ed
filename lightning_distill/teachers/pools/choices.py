"""Rules that choose among the teachers of a pool, per sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_distill.teachers.pools.panel import Panel
from lightning_distill.teachers.pools.scores import (
    confidence_difficulty,
    cost_aware_scores,
    teacher_scores,
    vote_disagreement,
)
from lightning_distill.teachers.pools.selection import (
    check_epsilon,
    check_tau,
    check_threshold,
    check_thresholds,
    evaluate_until,
    explore,
    hard_select,
    sample_teacher,
    select_by_difficulty,
    soft_select,
)

Mode = Literal["hard", "soft", "sampled"]
Measure = Literal["scout", "disagreement", "confidence"]


class Member:
    """One teacher of a pool, without its network: what a choice may know before it is run.

    Args:
        name: Unlike the others'.
        cost: Of one sample, not negative; any unit.
        accuracy: In [0, 1], if known.
        confidence: Mean largest probability, in [0, 1], if known.
    """

    def __init__(
        self, name: str, cost: float = 1.0, accuracy: float | None = None, confidence: float | None = None
    ) -> None:
        if not (isinstance(name, str) and name):
            raise ValueError(f"`name` must be a string that is not empty, got {name!r}.")
        if not 0 <= cost < float("inf"):
            raise ValueError(f"`cost` of the teacher {name!r} must be finite and not negative, got {cost}.")
        for what, value in {"accuracy": accuracy, "confidence": confidence}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"`{what}` of the teacher {name!r} must be in [0, 1], got {value}.")
        self.name = name
        self.cost = float(cost)
        self.accuracy = accuracy
        self.confidence = confidence


class Choice(nn.Module):
    """Gives each teacher of a pool its share in each sample.

    Teachers are asked through the :class:`~lightning_distill.teachers.pools.Panel`; those that are not, and get no
    share, are not run. State that must survive a resume stands in buffers or in the extra state.

    Attributes:
        learned: Whether the shares have a graph to parameters that are trained with the student.
    """

    learned: bool = False

    def bind(self, members: Sequence[Member]) -> None:
        """Learn who is in the pool; called once.

        Raises:
            ValueError: If the choice does not fit the pool.
        """

    def forward(self, panel: Panel) -> Tensor:
        """Shares, shape ``(B, T)``; not negative, each row sums to 1."""
        raise TypeError(f"{type(self).__name__} is a `Choice` without a `forward(panel)`; define one.")

    def share(self) -> None:
        """Tell the other processes what this one has decided; called by all of them after each training batch."""


class AverageChoice(Choice):
    """All teachers with equal shares."""

    def forward(self, panel: Panel) -> Tensor:
        """The same share for each."""
        return torch.full((panel.size, len(panel)), 1 / len(panel), device=panel.device)


class ScoredChoice(Choice):
    """By :func:`teacher_scores`; all teachers are run.

    Samples without a label are scored by confidence alone. Outside training ``"sampled"`` takes the highest score.

    Args:
        mode: ``"hard"`` takes the highest score, ``"soft"`` mixes by :func:`soft_select`, ``"sampled"`` draws one.
        alpha: See :func:`teacher_scores`.
        beta: See :func:`teacher_scores`. With 0 labels are not read.
        gamma: See :func:`teacher_scores`.
        tau: See :func:`soft_select`.

    Raises:
        ValueError: If ``mode`` is unknown or ``tau`` not positive.
    """

    def __init__(
        self, mode: Mode = "soft", *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.1, tau: float = 0.5
    ) -> None:
        super().__init__()
        _check_mode(mode)
        check_tau(tau)
        teacher_scores(torch.ones(1, 1, 1), alpha=alpha, beta=beta, gamma=gamma)  # checks the numbers
        self.mode: Mode = mode
        self.alpha, self.beta, self.gamma, self.tau = alpha, beta, gamma, tau

    def forward(self, panel: Panel) -> Tensor:
        """Shares by the scores."""
        labels = panel.labels if self.beta != 0 else None
        scores = teacher_scores(panel.probs(), labels, alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        return _shares(scores, self.mode, self.tau, training=panel.training)


class CostAwareChoice(Choice):
    """By :func:`cost_aware_scores` of what is known before the batch.

    With ``"hard"`` and ``"sampled"`` one teacher runs per sample. Costs are divided by the highest of the pool. ``tau``
    and ``epsilon`` are read anew in every step: a callback may lower them, to explore first and settle later. Outside
    training nothing is drawn: the highest score is taken.

    Args:
        mode: See :class:`ScoredChoice`. ``"soft"`` runs all.
        alpha: See :func:`cost_aware_scores`. Unless it is 0, every teacher must have an ``accuracy``.
        beta: See :func:`cost_aware_scores`.
        gamma: See :func:`cost_aware_scores`. Unless it is 0, every teacher must have a ``confidence``.
        tau: See :func:`soft_select`.
        epsilon: Share of training samples whose teacher is drawn with equal probabilities; not with ``"soft"``.

    Raises:
        ValueError: If an argument is outside its range; from the pool, if a teacher lacks a number.
    """

    _scores: Tensor

    def __init__(
        self,
        mode: Mode = "sampled",
        *,
        alpha: float = 1.0,
        beta: float = 0.5,
        gamma: float = 0.0,
        tau: float = 0.2,
        epsilon: float = 0.0,
    ) -> None:
        super().__init__()
        _check_mode(mode)
        check_tau(tau)
        check_epsilon(epsilon)
        if epsilon > 0 and mode == "soft":
            raise ValueError(
                f"`epsilon` is {epsilon}, but with `mode='soft'` nothing is drawn; use 'hard' or 'sampled'."
            )
        self.mode: Mode = mode
        self.alpha, self.beta, self.gamma, self.tau, self.epsilon = alpha, beta, gamma, tau, epsilon
        self.register_buffer("_scores", torch.zeros(0), persistent=False)

    def bind(self, members: Sequence[Member]) -> None:
        """Compute the scores."""
        accuracy = [_known(member, "accuracy", self.alpha) for member in members]
        confidence = [_known(member, "confidence", self.gamma) for member in members]
        dearest = max(member.cost for member in members) or 1.0
        cost = [member.cost / dearest for member in members]
        scores = cost_aware_scores(accuracy, cost, confidence, alpha=self.alpha, beta=self.beta, gamma=self.gamma)
        self._scores = scores.float()

    def forward(self, panel: Panel) -> Tensor:
        """The same probabilities for every sample, drawn for each."""
        scores = self._scores.to(panel.device).expand(panel.size, -1)
        return _shares(scores, self.mode, self.tau, training=panel.training, epsilon=self.epsilon)


class DifficultyChoice(Choice):
    """Cheap teachers for easy samples, dear ones for hard samples (:func:`select_by_difficulty`).

    Args:
        thresholds: Rising, one fewer than teachers; read anew in every step.
        measure: ``"scout"``: 1 minus the confidence of the cheapest teacher, which runs on all samples; the others run
            on theirs only. ``"confidence"``, of all teachers, or ``"disagreement"`` of their votes: all run.

    Raises:
        ValueError: If the thresholds fall or ``measure`` is unknown; from the pool, if their number does not fit.
    """

    def __init__(self, thresholds: Sequence[float] = (0.3, 0.6), measure: Measure = "scout") -> None:
        super().__init__()
        check_thresholds(thresholds)
        if measure not in ("scout", "disagreement", "confidence"):
            raise ValueError(f"`measure` must be 'scout', 'disagreement' or 'confidence', got {measure!r}.")
        self.thresholds = tuple(thresholds)
        self.measure: Measure = measure
        self._by_cost: list[int] = []

    def bind(self, members: Sequence[Member]) -> None:
        """Order the teachers by cost."""
        if len(self.thresholds) != len(members) - 1:
            raise ValueError(
                f"`thresholds` must be one fewer than the {len(members)} teachers of the pool, got "
                f"{len(self.thresholds)}: {list(self.thresholds)}."
            )
        self._by_cost = by_cost(members)

    def forward(self, panel: Panel) -> Tensor:
        """One teacher per sample."""
        if self.measure == "disagreement":
            difficulty = vote_disagreement(panel.probs())
        elif self.measure == "confidence":
            difficulty = confidence_difficulty(panel.probs())
        else:
            difficulty = 1 - panel.log_probs(self._by_cost[0]).amax(dim=-1).exp()
        places = select_by_difficulty(difficulty, self.thresholds)
        return _one_hot(torch.tensor(self._by_cost, device=panel.device)[places], len(panel))


class CascadeChoice(Choice):
    """Ask from cheap to dear until one is confident enough (:func:`evaluate_until`).

    The teacher that ends the search speaks; where none does, the most confident one. Confidence is no correctness:
    teachers that are confident about what they never saw end the search early and wrongly.

    Args:
        threshold: Largest probability, in [0, 1], that is enough.

    Raises:
        ValueError: If ``threshold`` is outside its range.
    """

    def __init__(self, threshold: float = 0.9) -> None:
        super().__init__()
        check_threshold(threshold)
        self.threshold = threshold
        self._by_cost: list[int] = []

    def bind(self, members: Sequence[Member]) -> None:
        """Order the teachers by cost."""
        self._by_cost = by_cost(members)

    def forward(self, panel: Panel) -> Tensor:
        """One teacher per sample."""

        def confidence(place: int, rows: Tensor) -> Tensor:
            return panel.log_probs(self._by_cost[place], rows).amax(dim=-1).exp()

        samples = torch.arange(panel.size, device=panel.device)
        chosen = evaluate_until(confidence, len(panel), samples, threshold=self.threshold).chosen
        return _one_hot(torch.tensor(self._by_cost, device=panel.device)[chosen], len(panel))


def by_cost(members: Sequence[Member]) -> list[int]:
    """Places of the teachers, the cheapest first; equal costs keep their order."""
    return sorted(range(len(members)), key=lambda place: members[place].cost)


def _known(member: Member, what: str, weight: float) -> float:
    value: float | None = getattr(member, what)
    if value is None and weight != 0:
        raise ValueError(
            f"The teacher {member.name!r} has no `{what}`, which the choice weighs with {weight}. Measure it and pass "
            f"`PoolMember(..., {what}=...)`, or give it the weight 0."
        )
    return value or 0.0


def _shares(scores: Tensor, mode: Mode, tau: float, *, training: bool, epsilon: float = 0.0) -> Tensor:
    if mode == "soft":
        return soft_select(scores, tau=tau)
    chosen = sample_teacher(scores, tau=tau) if mode == "sampled" and training else hard_select(scores)
    if training and epsilon > 0:
        chosen = explore(chosen, scores.shape[-1], epsilon)
    return _one_hot(chosen, scores.shape[-1])


def _one_hot(chosen: Tensor, teachers: int) -> Tensor:
    return nn.functional.one_hot(chosen, teachers).float()


def _check_mode(mode: str) -> None:
    if mode not in ("hard", "soft", "sampled"):
        raise ValueError(f"`mode` must be 'hard', 'soft' or 'sampled', got {mode!r}.")
