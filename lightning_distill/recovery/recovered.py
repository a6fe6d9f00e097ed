"""Recovery for configurations: a network in, the recovered one out."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_distill.evaluation import evaluate
from lightning_distill.quantization import quantized_layers
from lightning_distill.recovery.batch_norm import recalibrate_batch_norm
from lightning_distill.recovery.bias import correct_bias
from lightning_distill.recovery.guard import RecoveryStep, recover
from lightning_distill.tasks import Classification, Task


def recovered(
    network: nn.Module,
    data: L.LightningDataModule,
    *,
    task: Task | None = None,
    metric: str = "accuracy",
    mode: Literal["max", "min"] = "max",
    batches: int = 8,
) -> nn.Module:
    """A quantized network after the closed-form step that helps most on the validation data, or as it was.

    Tried are new batch-normalization statistics, corrected biases, and both, each alone on ``batches`` training batches
    without their labels; see :func:`~lightning_distill.recovery.recover`. In a pipeline: ``network: {class_path:
    lightning_distill.stages.stage_network}``.

    Args:
        network: Quantized by :func:`~lightning_distill.quantization.prepare`, and calibrated.
        data: A data module with training and validation data.
        task: How its batches are read. Default :class:`~lightning_distill.tasks.Classification`.
        metric: One of the task's.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        batches: How many training batches are looked at, at least 1.

    Returns:
        A network of the same class, in the mode that ``network`` was in.

    Raises:
        ValueError: If ``network`` has no quantized layer, the task has no such metric, or ``batches`` is below 1.
    """
    if not quantized_layers(network):
        raise ValueError(f"{type(network).__name__} has no quantized layer, so that nothing is to be recovered.")
    if not batches >= 1:
        raise ValueError(f"`batches` must be at least 1, got {batches}.")
    task = Classification() if task is None else task
    data.prepare_data()
    data.setup("fit")
    looked_at = [batch for batch, _ in zip(data.train_dataloader(), range(batches), strict=False)]
    validation = list(data.val_dataloader())

    def score(candidate: nn.Module) -> float:
        measured = evaluate(candidate, validation, task)
        if metric not in measured:
            raise ValueError(f"`metric` must be one of {sorted(measured)}, got {metric!r}.")
        return measured[metric]

    best, report = recover(network, _steps(network, looked_at, task), score, mode=mode)
    rank_zero_info(f"Recovery, validation {metric}:\n{report}")
    return best


def _steps(network: nn.Module, batches: list[Any], task: Task) -> dict[str, RecoveryStep]:
    """What can be done to this network, by name."""

    def statistics(part: nn.Module) -> object:
        return recalibrate_batch_norm(part, batches, task=task)

    def biases(part: nn.Module) -> object:
        return correct_bias(part, batches, task=task)

    def both(part: nn.Module) -> object:
        statistics(part)
        return biases(part)

    steps: dict[str, RecoveryStep] = {"biases": biases}
    if any(getattr(module, "track_running_stats", False) for module in network.modules()):
        steps |= {"statistics": statistics, "statistics, then biases": both}
    return steps


__all__ = ["recovered"]
