"""What is measured of a student on a validation or test set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lightning_distill.modes import inference
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import Task


class Evaluation:
    """The task's metrics of a student, and, beside a teacher, how well it imitates.

    With a teacher whose outputs are comparable and all known, also the task's imitation metrics: for classes
    ``agreement`` (share of items on which both decide alike) and ``fidelity`` (mean KL divergence from the teacher,
    nats, temperature 1). Values are exact over all processes.

    Args:
        task: Which metrics there are.
        outputs: The student's first outputs: number of classes and device.
    """

    def __init__(self, task: Task, outputs: Outputs) -> None:
        device = outputs.logits.device
        self._task = task
        self._own = {name: metric.to(device) for name, metric in task.metrics(outputs).items()}
        self._pair = {name: metric.to(device) for name, metric in task.imitation_metrics().items()}
        self._losses: dict[str, MeanMetric] = {}
        self._fed: set[str] = set()

    def update(self, step: Step) -> None:
        """Take in one batch; logits that stand as hidden states and a head are computed in parts and not kept."""
        for part, student in step.student.chunks():
            labels = step.labels[part] if step.labels is not None else None
            mask = step.mask[part] if step.mask is not None else None
            scored = self._task.evaluable(Outputs(student), labels, mask)
            if scored is not None:
                self._update(self._own, *scored)
            if step.teacher is None or step.teacher.item_shape != step.student.item_shape:
                continue
            if step.teacher.top_k is not None:  # all logits are not known
                continue
            teacher = step.teacher.logits_of(part)
            if not self._task.comparable(student, teacher):
                continue
            if mask is not None:
                student, teacher = student[mask], teacher[mask]
            self._update(self._pair, student.float(), teacher.float())

    def update_losses(self, losses: Mapping[str, Tensor], items: int | Tensor) -> None:
        """Take in the losses of one batch, means over ``items``."""
        for name, value in losses.items():
            metric = self._losses.setdefault(name, MeanMetric().to(value.device))
            metric.update(value.detach(), torch.as_tensor(items, device=value.device))
            self._fed.add(name)

    def compute(self) -> dict[str, Tensor]:
        """All values by name, over all processes; what never got an item is left out."""
        metrics = {**self._own, **self._pair, **self._losses}
        return {name: metric.compute() for name, metric in metrics.items() if name in self._fed}

    def keep_to_this_process(self) -> None:
        """Give the values of what this process has measured, though there may be others."""
        for metric in (*self._own.values(), *self._pair.values(), *self._losses.values()):
            for part in metric.modules():  # a metric may hold others
                if isinstance(part, Metric):
                    part.distributed_available_fn = _nobody_else

    def _update(self, metrics: Mapping[str, Metric], predictions: Tensor, target: Tensor) -> None:
        for name, metric in metrics.items():
            metric.update(predictions, target)
            self._fed.add(name)


def _nobody_else() -> bool:
    return False


def evaluate(
    network: nn.Module, batches: Iterable[Any], task: Task, *, reference: nn.Module | None = None
) -> dict[str, float]:
    """The task's metrics of ``network`` on ``batches``, in eval mode; without a Trainer, in this process alone.

    Other processes of a distributed run are not asked: each of them may call it, or only one.

    Args:
        network: Reads batches as ``task`` says.
        batches: With labels; on the network's device.
        task: Which metrics there are.
        reference: What the network is to imitate: adds the imitation metrics, such as ``agreement``.

    Raises:
        ValueError: If there is no batch.

    Example:
        >>> from lightning_distill.tasks import Classification
        >>> batch = (torch.eye(3), torch.tensor([0, 1, 0]))
        >>> round(evaluate(nn.Identity(), [batch], Classification())["accuracy"], 4)
        0.6667
    """
    measured: Evaluation | None = None
    with inference(network):
        for batch in batches:
            student = task.run(network, batch)
            teacher = None
            if reference is not None:
                with inference(reference):
                    teacher = task.run(reference, batch)
            measured = measured or Evaluation(task, student)
            step = Step(batch, student, teacher, labels=task.labels(batch), mask=task.mask(batch, student))
            measured.update(step)
    if measured is None:
        raise ValueError("`batches` is empty: there is nothing to measure on.")
    measured.keep_to_this_process()
    return {name: float(value) for name, value in measured.compute().items()}
