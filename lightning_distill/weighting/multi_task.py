"""Weights of several tasks, each of which has a loss on labels and one against a teacher."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_distill.difficulty import multi_task_loss
from lightning_distill.weighting.weighting import Weighting


class MultiTaskWeights(Weighting):
    r""":math:`\sum_i w_i (\mathrm{CE}_i + \lambda_i \mathrm{KD}_i)` over tasks: a weight each, and one for its teacher.

    The terms of the task ``"topic"`` are called ``"topic/hard"`` and ``"topic/soft"``. Both mappings may be changed
    during the training; a callback that turns weights writes there.

    Args:
        tasks: Weight ``w`` of each task by name, not negative.
        kd_weights: Weight :math:`\lambda` of the teacher's term within each task, not negative; 1 where a task is not
            named.

    Raises:
        ValueError: If there are no tasks, a weight is negative, or ``kd_weights`` names a task that is not there.

    Example:
        >>> weighting = MultiTaskWeights({"topic": 0.5, "mood": 2.0}, {"mood": 0.25})
        >>> weighting.weights()
        {'topic/hard': 0.5, 'topic/soft': 0.5, 'mood/hard': 2.0, 'mood/soft': 0.5}
    """

    def __init__(self, tasks: Mapping[str, float], kd_weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("`tasks` is empty; give each task a weight by its name.")
        given = dict(kd_weights or {})
        if unknown := [name for name in given if name not in tasks]:
            raise ValueError(f"`kd_weights` names {unknown}, which are no tasks; there are {list(tasks)}.")
        for argument, values in {"tasks": tasks, "kd_weights": given}.items():
            for name, value in values.items():
                if not value >= 0:  # also rejects NaN
                    raise ValueError(f"`{argument}[{name!r}]` must not be negative, got {value}.")
        self.tasks = dict(tasks)
        self.kd_weights = dict.fromkeys(tasks, 1.0) | given

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Weighted sum of ``losses``; scalar.

        Raises:
            ValueError: If a task's term is missing or a term belongs to no task.
        """
        expected = self.weights()
        if losses.keys() != expected.keys():
            raise ValueError(f"MultiTaskWeights weighs the terms {list(expected)}, but the terms are {list(losses)}.")
        return multi_task_loss(
            [losses[f"{task}/hard"] for task in self.tasks],
            [losses[f"{task}/soft"] for task in self.tasks],
            weights=list(self.tasks.values()),
            kd_weights=[self.kd_weights[task] for task in self.tasks],
        )

    def weights(self) -> dict[str, float]:
        """The present weight of each term."""
        found: dict[str, float] = {}
        for task, weight in self.tasks.items():
            found |= {f"{task}/hard": weight, f"{task}/soft": weight * self.kd_weights[task]}
        return found
