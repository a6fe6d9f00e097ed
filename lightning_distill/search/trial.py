"""One trial: the trainings of a setting, one for each seed, and what they reached on the validation data."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import optuna

from lightning_distill.comparison.callbacks import LastCheckpoint, ReportFraction
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.comparison.runs import (
    CHECKPOINT,
    RESULT,
    Experiment,
    check_experiment,
    make_trainer,
    raise_keyboard_interrupt,
)
from lightning_distill.files import read_json, write_json
from lightning_distill.search.limits import Limits

Build = Callable[[Mapping[str, Any], int], Experiment]
"""Makes an experiment from the settings, by name, and a seed; called after ``seed_everything(seed)``."""


class ReportToOptuna(L.Callback):
    """Tell an Optuna trial the metric after every validation, and stop the training if the trial is to be pruned.

    Works in any Trainer: ``study.optimize(lambda trial: ...)`` with ``Trainer(callbacks=[ReportToOptuna(trial)])``.

    Args:
        trial: The trial.
        metric: Name of the metric in the log.
        first_step: Number of validations of the trial before this training.

    Raises:
        optuna.TrialPruned: Out of ``trainer.fit``, where the study's pruner says so.
        ValueError: Where the metric was not logged.
    """

    def __init__(self, trial: optuna.trial.Trial, metric: str = "val/accuracy", *, first_step: int = 0) -> None:
        self.trial = trial
        self.metric = metric
        self.step = first_step
        self._known: set[int] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See what was reported before a resume."""
        stored = self.trial.study.get_trials(deepcopy=False)[self.trial.number]
        self._known = set(stored.intermediate_values)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report; perhaps stop."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = validation_metric(dict(trainer.callback_metrics), self.metric)
        if self.step not in self._known and math.isfinite(value):
            self.trial.report(value, self.step)
        self.step += 1
        if self.trial.should_prune():
            raise optuna.TrialPruned(f"The trial was pruned after validation {self.step}.")

    def state_dict(self) -> dict[str, Any]:
        """Number of validations so far."""
        return {"step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.step = state_dict["step"]


def train_trial(
    build: Build,
    settings: Mapping[str, Any],
    trial: optuna.trial.Trial,
    *,
    folder: Path,
    seeds: Sequence[int],
    metrics: Sequence[str],
    prune: bool,
    report: Callable[[float], None],
    limits: Limits | None = None,
) -> tuple[list[float], float]:
    """Train ``settings`` with each seed and return the mean of each validation metric over the seeds, and the seconds.

    A training that was killed continues after its last complete epoch; one that is finished is not repeated.

    Args:
        build: Makes the experiment.
        settings: By name.
        trial: That the settings belong to.
        folder: Of this trial.
        seeds: Of the trainings.
        metrics: Names of the validation metrics.
        prune: Whether the trial may be stopped early, by its first metric.
        report: Told the fraction that is done.
        limits: What the student may cost.

    Raises:
        optuna.TrialPruned: If it was stopped, or was not begun because its student costs too much.
        FloatingPointError: If a loss, or a metric at the end, was not finite.
        ValueError: If a metric was not logged, or ``build`` returned a part of an earlier run.
    """
    found: list[list[float]] = []
    validations, seconds = 0, 0.0
    for i, seed in enumerate(seeds):
        result = _trained(
            build,
            settings,
            trial,
            seed=seed,
            folder=folder / f"seed{seed}",
            metrics=metrics,
            first_step=validations,
            prune=prune,
            report=lambda fraction, i=i: report((i + fraction) / len(seeds)),  # type: ignore[misc]
            limits=limits,
        )
        found.append([result[metric] for metric in metrics])
        validations += int(result["validations"])
        seconds += result["seconds"]
    return [sum(column) / len(column) for column in zip(*found, strict=True)], seconds


def _trained(
    build: Build,
    settings: Mapping[str, Any],
    trial: optuna.trial.Trial,
    *,
    seed: int,
    folder: Path,
    metrics: Sequence[str],
    first_step: int,
    prune: bool,
    report: Callable[[float], None],
    limits: Limits | None,
) -> dict[str, float]:
    path = folder / RESULT
    if path.exists():
        known: dict[str, float] = read_json(path)
        return known
    folder.mkdir(parents=True, exist_ok=True)
    last = LastCheckpoint(folder / CHECKPOINT)
    callbacks: list[L.Callback] = [ReportFraction(report)]
    if prune:
        callbacks.append(ReportToOptuna(trial, metrics[0], first_step=first_step))
    with quiet_lightning():
        L.seed_everything(seed, workers=True, verbose=False)
        experiment = build(settings, seed)
        name = f"trial {trial.number}"
        check_experiment(experiment, name=name, seed=seed, seen=weakref.WeakSet())
        if limits is not None and (excess := limits.excess(limits.measure(experiment))):
            trial.set_user_attr("note", f"over the limits: {excess}")
            raise optuna.TrialPruned(f"The student costs too much: {excess}.")
        trainer = make_trainer(experiment, name=name, folder=folder, callbacks=[*callbacks, last])
        resume = last.path if last.path.exists() else None
        with raise_keyboard_interrupt(trainer):
            trainer.fit(experiment.module, datamodule=experiment.datamodule, ckpt_path=resume)
    if not last.history:
        raise ValueError(
            "The training was never validated, so that there is nothing to choose by. Let the Trainer validate "
            "(`limit_val_batches`, `check_val_every_n_epoch`), and the data module have a `val_dataloader`."
        )
    result = {metric: validation_metric(last.history[-1], metric) for metric in metrics}
    if not all(math.isfinite(value) for value in result.values()):
        raise FloatingPointError(f"A metric is not finite after the last epoch: {result}.")
    result |= {"seconds": last.times[0], "validations": float(len(last.history))}
    write_json(path, result)
    last.path.unlink(missing_ok=True)
    return result


def validation_metric(logged: Mapping[str, Any], metric: str) -> float:
    """The value of ``metric`` among what was logged.

    Raises:
        ValueError: If it was not logged; the message lists what was.
    """
    if metric not in logged:
        names = sorted(name for name in logged if name not in ("epoch", "step"))
        raise ValueError(f"`metric` is {metric!r}, which the validation did not log; there are {names}.")
    return float(logged[metric])
