"""Several networks that teach as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import cross_entropy

from lightning_distill.losses.ensemble_targets import MEMBER_LOGITS, MEMBER_WEIGHTS
from lightning_distill.outputs import Outputs
from lightning_distill.tasks import Task
from lightning_distill.teachers.build import TeacherLike, build_teacher
from lightning_distill.teachers.teacher import Teacher

Space = Literal["prob", "logit"]


def ensemble_log_probs(
    logits: Tensor, weights: Tensor | Sequence[float] | None = None, *, space: Space = "prob"
) -> Tensor:
    r"""Logarithm of what an ensemble predicts, in float32 or wider.

    .. math:: p = \sum_m w_m \, \sigma(z_m) \quad \text{or} \quad p = \sigma\left(\sum_m w_m z_m\right)

    The first, a mixture, is never worse in negative log-likelihood than its members are on average. The second is their
    geometric mean, normalized.

    Args:
        logits: Unnormalised scores of the members, shape ``(members, items..., C)``.
        weights: Of the members, not negative; scaled to sum 1. Default: all equal.
        space: What is averaged, ``"prob"`` or ``"logit"``.

    Returns:
        Shape ``(items..., C)``.

    Raises:
        ValueError: If the weights do not fit, or ``space`` is unknown.

    Example:
        >>> logits = torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()
        >>> ensemble_log_probs(logits, [3, 1]).exp()
        tensor([[0.8000, 0.2000]])
    """
    shares = ensemble_shares(weights, len(logits)).to(logits.device)
    shares = shares.view(-1, *[1] * (logits.ndim - 1))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if space == "logit":
        return (shares.to(wide.dtype) * wide).sum(dim=0).log_softmax(dim=-1)
    if space == "prob":
        return (wide.log_softmax(dim=-1) + shares.to(wide.dtype).log()).logsumexp(dim=0)
    raise ValueError(f"`space` must be 'prob' or 'logit', got {space!r}.")


def ensemble_shares(weights: Tensor | Sequence[float] | None, members: int) -> Tensor:
    """``weights`` scaled to sum 1, float64, shape ``(members,)``; equal ones for ``None``.

    Raises:
        ValueError: If their number is another, one is negative or not finite, or all are 0.
    """
    if weights is None:
        return torch.full((members,), 1 / members, dtype=torch.float64)
    shares = torch.as_tensor(weights, dtype=torch.float64)
    if shares.shape != (members,) or not shares.isfinite().all() or (shares < 0).any() or not shares.sum() > 0:
        raise ValueError(
            f"`weights` must be {members} numbers that are not negative, one per member and not all 0, got "
            f"{shares.tolist()}."
        )
    return shares / shares.sum()


def performance_weights(accuracies: Sequence[float]) -> list[float]:
    """Weights in proportion to the members' accuracies: ``A_i / sum(A)``.

    Raises:
        ValueError: If an accuracy is negative or all are 0.

    Example:
        >>> [round(weight, 2) for weight in performance_weights([0.8, 0.7, 0.5])]
        [0.4, 0.35, 0.25]
    """
    weights: list[float] = ensemble_shares(list(accuracies), len(accuracies)).tolist()
    return weights


def complexity_weights(costs: Sequence[float]) -> list[float]:
    """Weights in inverse proportion to the members' costs: ``(1 / C_i) / sum(1 / C)``.

    Beware: the smallest member gets most of the weight, 77 % for costs of 100, 50 and 10.

    Args:
        costs: Positive: parameters, operations, seconds.

    Raises:
        ValueError: If a cost is not positive.
    """
    if not all(0 < cost < math.inf for cost in costs):
        raise ValueError(f"`costs` must be positive, got {list(costs)}.")
    return performance_weights([1 / cost for cost in costs])


def learn_weights(log_probs: Tensor, labels: Tensor, *, steps: int = 100) -> list[float]:
    """The mixture's weights of least negative log-likelihood on labelled data.

    The likelihood of a mixture is concave in its weights, so that there is one best value; a softmax of free numbers
    stays inside of the simplex, and reaches its border only in the limit. Use data that no member was trained on:
    on its training set the largest member is always right.

    Args:
        log_probs: Of the members, shape ``(members, N, C)``.
        labels: Class indices, shape ``(N,)``.
        steps: Of L-BFGS, at most.

    Returns:
        One weight per member; they sum to 1.

    Raises:
        ValueError: If there is no labelled sample.
    """
    labels = labels.to(log_probs.device)
    keep = labels >= 0
    if not keep.any():
        raise ValueError("`labels` has no labelled sample to learn weights from.")
    true = log_probs[:, keep].double().gather(2, labels[keep].expand(len(log_probs), -1).unsqueeze(2)).squeeze(2)
    free = torch.zeros(len(true), dtype=torch.float64, device=true.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(true + free.log_softmax(dim=0).unsqueeze(1)).logsumexp(dim=0).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    weights: list[float] = free.detach().softmax(dim=0).tolist()
    return weights


class EnsembleTeacher(Teacher):
    """Several teachers as one: it says the average of what they say (Hinton et al. 2015, section 3; You et al. 2017).

    Its logits are the logarithm of the average; a temperature then softens the average. What each member says is in
    ``Outputs.features``, for :class:`~lightning_distill.losses.EnsembleTargets`, which averages the softened
    predictions instead.

    Args:
        members: Teachers, or what :func:`~lightning_distill.teachers.build_teacher` makes one of; all with the same
            classes.
        weights: Of the members, not negative; scaled to sum 1. Default: all equal. See :func:`performance_weights`,
            :func:`complexity_weights` and :func:`learn_weights`.
        space: What is averaged, ``"prob"`` or ``"logit"``.

    Raises:
        ValueError: If there is no member, or ``weights`` or ``space`` do not fit.

    Example:
        >>> teacher = EnsembleTeacher([nn.Linear(2, 3), nn.Linear(2, 3)], weights=[2, 1])
        >>> teacher.shares
        [0.6666666666666666, 0.3333333333333333]
    """

    def __init__(
        self, members: Sequence[TeacherLike], weights: Sequence[float] | None = None, space: Space = "prob"
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("`members` is empty: an ensemble needs at least one teacher.")
        if space not in ("prob", "logit"):
            raise ValueError(f"`space` must be 'prob' or 'logit', got {space!r}.")
        if any(member is None or isinstance(member, str) for member in members):
            raise ValueError("`members` must be networks or teachers, none of them None or a name; load them first.")
        built = (build_teacher(member, Task()) for member in members)
        self.members = nn.ModuleList(member for member in built if member is not None)
        self.shares: list[float] = ensemble_shares(weights, len(members)).tolist()
        self.space: Space = space

    @property
    def ready(self) -> bool:
        """Whether every member has something to say."""
        return all(member.ready for member in self._teachers)

    def forward(self, batch: Any, task: Task) -> Outputs | None:
        """The average of what the members say; ``None`` if one of them says nothing.

        Raises:
            ValueError: If the members' logits have different shapes.
        """
        said = [member(batch, task) for member in self._teachers]
        if any(outputs is None for outputs in said):
            return None
        shapes = [tuple(outputs.logits.shape) for outputs in said]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"The members of an ensemble must speak about the same classes, but their logits have the shapes "
                f"{', '.join(map(str, shapes))}. Leave out the one that differs."
            )
        logits = torch.stack([outputs.logits for outputs in said])
        shares = torch.tensor(self.shares, device=logits.device)
        features = {MEMBER_LOGITS: logits, MEMBER_WEIGHTS: shares}
        return Outputs(ensemble_log_probs(logits, shares, space=self.space), features=features)

    def attach(self, student: nn.Module) -> None:
        """Tell every member."""
        for member in self._teachers:
            member.attach(student)

    def place(self, device: torch.device, mesh: DeviceMesh | None) -> None:
        """Place every member."""
        for member in self._teachers:
            member.place(device, mesh)

    @torch.no_grad()
    def learned_shares(self, batches: Iterable[Any], task: Task) -> list[float]:
        """The members' shares of least negative log-likelihood on labelled ``batches``; see :func:`learn_weights`.

        Args:
            batches: On the members' device. None of them should have been trained on these.
            task: How a batch is read.

        Raises:
            ValueError: If no item has a label, or the task has no classes.
        """
        if not task.imitable:
            raise ValueError(f"The weights of an ensemble are learned on classes; {type(task).__name__} has none.")
        true = []
        for batch in batches:
            labels = task.labels(batch)
            said = [member(batch, task) for member in self._teachers]
            scored = [task.evaluable(outputs, labels, task.mask(batch, outputs)) for outputs in said if outputs]
            pairs = [pair for pair in scored if pair is not None]
            if len(pairs) == len(said):
                members = [-cross_entropy(logits, label, reduction="none").cpu() for logits, label in pairs]
                true.append(torch.stack(members))
        if not true:
            raise ValueError("The weights of an ensemble are learned on labels, but the batches have none.")
        log_probs = torch.cat(true, dim=1).unsqueeze(2)  # of the right class, which becomes class 0 of 1
        return learn_weights(log_probs, torch.zeros(log_probs.shape[1], dtype=torch.long))

    @property
    def _teachers(self) -> list[Any]:
        return list(self.members)


__all__ = [
    "EnsembleTeacher",
    "complexity_weights",
    "ensemble_log_probs",
    "ensemble_shares",
    "learn_weights",
    "performance_weights",
]
