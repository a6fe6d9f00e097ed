"""Temperature and weight of the teacher from how hard the task is for the student."""

from __future__ import annotations

import math
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from lightning_distill.difficulty import difficulty_temperature, difficulty_weight, task_difficulty
from lightning_distill.modules.base import DistillationModule
from lightning_distill.outputs import UNLABELLED, Outputs
from lightning_distill.weighting import FixedWeights, MultiTaskWeights


class TaskDifficulty(L.Callback):
    r"""Turn temperature and weight of the teacher by the difficulty ``D`` of the task.

    After every validation ``D`` is the performance gap :math:`(A_T - A_S) / A_T` between the teacher's and the
    student's accuracy; or, with ``term``, the square root of a loss term on features, such as the (squared) maximum
    mean discrepancy of student and teacher, of which a running mean over the optimizer steps is kept. The temperature
    becomes :math:`\tau_0 (1 + \beta D)`, the weight of the teacher's term :math:`\lambda_0 (1 + \min(D, \theta))`.

    The difficulty is the same in all processes, and in the checkpoint.

    Args:
        beta: Growth of the temperature per unit of difficulty; 0 leaves it alone.
        limit: Difficulty :math:`\theta` from which on the weight stays, not negative; 0 leaves the weight alone.
        teacher_accuracy: ``A_T``. By default measured in the first validation, which costs one pass of the teacher.
        metric: What the student's accuracy is called in the log.
        term: Name of the loss term whose square root is the difficulty, in place of the accuracies.
        momentum: Share of the old running mean of that term, in [0, 1).
        weighted: Name of the term whose weight is turned; or, with
            :class:`~lightning_distill.weighting.MultiTaskWeights`, of the task.
        tau_min: Lowest temperature, positive.
        tau_max: Highest temperature.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training if the module lacks a term.
        TypeError: At the start of the training, if the module has no constant ``temperature`` or no constant weights.
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        limit: float = 0.3,
        teacher_accuracy: float | None = None,
        metric: str = "val/accuracy",
        term: str | None = None,
        momentum: float = 0.9,
        weighted: str = "soft",
        tau_min: float = 0.5,
        tau_max: float = 20.0,
    ) -> None:
        difficulty_temperature(0.0, tau0=1.0, beta=beta, tau_min=tau_min, tau_max=tau_max)  # these check the values
        difficulty_weight(0.0, limit=limit)
        if teacher_accuracy is not None and not 0 < teacher_accuracy < math.inf:
            raise ValueError(f"`teacher_accuracy` must be positive, got {teacher_accuracy}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must be in [0, 1), got {momentum}.")
        self.beta = beta
        self.limit = limit
        self.teacher_accuracy = teacher_accuracy
        self.metric = metric
        self.term = term
        self.momentum = momentum
        self.weighted = weighted
        self.tau_min = tau_min
        self.tau_max = tau_max
        self.difficulty: float | None = None
        self._start: tuple[float, float] | None = None  # temperature and weight for D = 0
        self._square: float | None = None
        self._losses: list[Tensor] = []
        self._right: Tensor | None = None  # right and all answers of the teacher

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note temperature and weight of an easy task; apply what a checkpoint knew."""
        self._check(pl_module)
        if self._start is None:
            self._start = (float(pl_module.temperature), _weight(pl_module, self.weighted))  # type: ignore[arg-type]
        if self.difficulty is not None:
            self._apply(pl_module, self.difficulty)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Note the term's value."""
        if self.term is not None:
            live = cast(DistillationModule, pl_module).live
            assert live is not None  # it is there from the training step to the end of the backward pass
            self._losses.append(live.losses[self.term].detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Difficulty of the steps to come, from the term."""
        if self.term is None:
            return
        mean = torch.stack(self._losses).float().mean()
        self._losses = []
        if trainer.world_size > 1:
            mean = trainer.strategy.reduce(mean, reduce_op="mean")
        value = max(mean.item(), 0.0)  # an unbiased estimate of a discrepancy may be negative
        if not math.isfinite(value):
            return
        self._square = value if self._square is None else self.momentum * self._square + (1 - self.momentum) * value
        self._turn(pl_module, math.sqrt(self._square))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count what the teacher gets right, the first time."""
        if self.term is not None or self.teacher_accuracy is not None or trainer.sanity_checking:
            return
        if trainer.state.fn == "fit" and dataloader_idx == 0:
            found = _right_answers(pl_module, batch)
            self._right = found if self._right is None else self._right + found

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add up what the teacher got right, in all processes."""
        if self._right is None:
            return
        right, self._right = self._right, None
        if trainer.world_size > 1:
            right = trainer.strategy.reduce(right, reduce_op="mean")
        if not right[1] > 0:
            raise ValueError("TaskDifficulty found no labelled item in the validation data; give `teacher_accuracy`.")
        self.teacher_accuracy = (right[0] / right[1]).item()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Difficulty of the epochs to come, from the accuracies."""
        if self.term is not None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.metric not in trainer.callback_metrics:
            raise ValueError(
                f"`metric` of TaskDifficulty is {self.metric!r}, which was not logged; there are "
                f"{sorted(trainer.callback_metrics)}."
            )
        assert self.teacher_accuracy is not None
        self._turn(pl_module, task_difficulty(self.teacher_accuracy, trainer.callback_metrics[self.metric].item()))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the difficulty."""
        if self.difficulty is not None and trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            pl_module.log("difficulty", self.difficulty, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """The difficulty, what it was computed from, and what it is applied to."""
        return {
            "difficulty": self.difficulty,
            "square": self._square,
            "teacher_accuracy": self.teacher_accuracy,
            "start": self._start,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with it."""
        self.difficulty = state_dict["difficulty"]
        self._square = state_dict["square"]
        self._start = state_dict["start"]
        if self.teacher_accuracy is None:
            self.teacher_accuracy = state_dict["teacher_accuracy"]

    def _turn(self, pl_module: L.LightningModule, difficulty: float) -> None:
        self.difficulty = difficulty
        self._apply(pl_module, difficulty)

    def _apply(self, pl_module: L.LightningModule, difficulty: float) -> None:
        assert self._start is not None
        tau0, weight0 = self._start
        if self.beta != 0:
            temperature = difficulty_temperature(
                difficulty, tau0=tau0, beta=self.beta, tau_min=self.tau_min, tau_max=self.tau_max
            )
            pl_module.temperature = temperature  # type: ignore[assignment]
        if self.limit > 0:
            weight = difficulty_weight(difficulty, weight0=weight0, limit=self.limit)
            _set_weight(pl_module, self.weighted, weight)

    def _check(self, pl_module: L.LightningModule) -> None:
        if self.beta != 0 and not isinstance(getattr(pl_module, "temperature", None), float):
            raise TypeError(
                f"TaskDifficulty sets `temperature`, for which {type(pl_module).__name__} has no constant; give it a "
                "number, or use `beta=0`."
            )
        if self.limit > 0:
            _weight(pl_module, self.weighted)
        if self.term is not None and self.term not in getattr(pl_module, "terms", {}):
            raise ValueError(f"`term` of TaskDifficulty is {self.term!r}; the terms are {list(pl_module.terms)}.")  # type: ignore[arg-type]
        if self.term is None and self.teacher_accuracy is None and getattr(pl_module, "teacher", None) is None:
            raise ValueError("TaskDifficulty measures the teacher's accuracy, but there is no teacher.")


def _weights(pl_module: L.LightningModule) -> dict[str, float]:
    """What is turned: the weights of terms, or of the teacher within tasks."""
    weighting = getattr(pl_module, "weighting", None)
    if isinstance(weighting, FixedWeights):
        return weighting.values
    if isinstance(weighting, MultiTaskWeights):
        return weighting.kd_weights
    raise TypeError(
        f"TaskDifficulty turns a constant weight, but the weighting is a {type(weighting).__name__}. Use FixedWeights "
        "or MultiTaskWeights, or `limit=0`, which leaves the weights alone."
    )


def _weight(pl_module: L.LightningModule, name: str) -> float:
    weights = _weights(pl_module)
    if name not in weights:
        raise ValueError(f"`weighted` of TaskDifficulty is {name!r}; there are weights of {list(weights)}.")
    return weights[name]


def _set_weight(pl_module: L.LightningModule, name: str, value: float) -> None:
    _weights(pl_module)[name] = value


@torch.no_grad()
def _right_answers(pl_module: Any, batch: Any) -> Tensor:
    """How many labelled items the teacher decides rightly, and how many there are; shape ``(2,)``."""
    teacher: Outputs = pl_module.teacher(batch, pl_module.task)
    labels = pl_module.task.labels(batch)
    logits = teacher.logits
    if labels is None or labels.is_floating_point() or labels.shape != logits.shape[:-1]:
        raise ValueError("TaskDifficulty counts right classes, and this task has none; give `teacher_accuracy`.")
    known = labels != UNLABELLED
    right = (pl_module.task.predictions(logits) == labels) & known
    return torch.stack([right.sum(), known.sum()]).double()
