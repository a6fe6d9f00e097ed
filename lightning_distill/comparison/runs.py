"""One run of a comparison: a method with a seed, trained, tested and exported."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, MutableSet
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from torch import nn

from lightning_distill.comparison.callbacks import LastCheckpoint, ReportFraction
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.files import read_json, write_json

OWNED = ("logger", "default_root_dir", "enable_checkpointing")
RESULT = "result.json"
HISTORY = "history.json"
CHECKPOINT = "last.ckpt"
STUDENT = "student.safetensors"


@dataclass(frozen=True)
class Experiment:
    """What to train: the answer of a :data:`Method`.

    Attributes:
        module: The module, new in every run. If it has ``export(path)``, the comparison calls it after the training.
        datamodule: The data, with a ``test_dataloader``; ``None`` if the module has the data loaders itself.
        trainer: Keyword arguments of ``lightning.Trainer``; ``logger``, ``default_root_dir`` and
            ``enable_checkpointing`` belong to the comparison. Callbacks must be new in every run.
    """

    module: L.LightningModule
    datamodule: L.LightningDataModule | None = None
    trainer: Mapping[str, Any] = field(default_factory=dict)


Method = Callable[[int], Experiment]
"""Makes an experiment from a seed; called after ``seed_everything(seed)``, which fixes the initial weights."""


def run(
    method: Method,
    *,
    name: str,
    seed: int,
    folder: Path,
    start_logger: Callable[[], Logger | None],
    seen: MutableSet[Any],
    report: Callable[[float], None],
) -> dict[str, Any]:
    """Train, test and export ``method`` with ``seed``, or return the result of the run if it is finished.

    A run that was killed continues after its last complete epoch. The weights of the last epoch are tested.

    Args:
        method: The method.
        name: Its name.
        seed: Of everything random.
        folder: Of this run.
        start_logger: Makes the logger; called once there is something to log.
        seen: Modules and callbacks of earlier runs; those of this one are added.
        report: Told the fraction of the training that is done.

    Returns:
        ``method``, ``seed``, every metric that was logged in the test, ``parameters`` (trainable, of the student),
        ``steps`` of the optimizer, ``seconds`` and ``cpu_seconds`` of the training.

    Raises:
        TypeError: If the method returns no experiment.
        ValueError: If it returns a part of an earlier run, or asks for more than one device.
    """
    finished = finished_run(folder)
    if finished is not None:
        return finished
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_lightning():
        L.seed_everything(seed, workers=True, verbose=False)
        experiment = method(seed)
        check_experiment(experiment, name=name, seed=seed, seen=seen)
        last = LastCheckpoint(folder / CHECKPOINT)
        trainer = make_trainer(experiment, name=name, folder=folder, callbacks=[last, ReportFraction(report)])
        logger = start_logger()
        trainer.loggers = [] if logger is None else [logger]
        resume = last.path if last.path.exists() else None
        with raise_keyboard_interrupt(trainer):
            trainer.fit(experiment.module, datamodule=experiment.datamodule, ckpt_path=resume)
        with raise_keyboard_interrupt(trainer):
            tested = trainer.test(experiment.module, datamodule=experiment.datamodule, verbose=False)
    seconds, cpu_seconds = last.times
    result = {
        "method": name,
        "seed": seed,
        **{metric: value for of_loader in tested for metric, value in of_loader.items()},
        "parameters": _trainable_parameters(experiment.module),
        "steps": trainer.global_step,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }
    export = getattr(experiment.module, "export", None)
    if callable(export):
        (folder / STUDENT).unlink(missing_ok=True)  # of an attempt that was killed between here and its result
        export(folder / STUDENT)
    write_json(folder / HISTORY, last.history)
    write_json(folder / RESULT, result)  # from here on the run is finished
    if callable(export):
        last.path.unlink(missing_ok=True)  # large, and the student is there without it
    return result


def finished_run(folder: Path) -> dict[str, Any] | None:
    """Result of the run in ``folder``, or ``None`` if it is not finished; null (not finite) is read as NaN."""
    path = folder / RESULT
    if not path.exists():
        return None
    return {key: float("nan") if value is None else value for key, value in read_json(path).items()}


def run_history(folder: Path) -> list[dict[str, Any]]:
    """Validation metrics of the run in ``folder``, one mapping per validation; empty if it is not finished."""
    path = folder / HISTORY
    history: list[dict[str, Any]] = read_json(path) if path.exists() else []
    return history


def check_experiment(experiment: Any, *, name: str, seed: int, seen: MutableSet[Any]) -> None:
    """Refuse what is no experiment, and parts of earlier runs.

    A module, a trained part of it or a callback that comes from an earlier run would carry its training over.
    """
    if not isinstance(experiment, Experiment):
        raise TypeError(
            f"The method {name!r} must return an `Experiment(module, datamodule, trainer)`, got "
            f"{type(experiment).__name__}."
        )
    owned = sorted(set(OWNED) & set(experiment.trainer))
    if owned:
        raise ValueError(
            f"The method {name!r} sets `{owned[0]}` of the Trainer, which belongs to the comparison. Leave it out."
        )
    trained = {path: part for path, part in experiment.module.named_modules() if _has_trainable_parameters(part)}
    parts = {"module": experiment.module, **{f"module.{path}": part for path, part in trained.items() if path}}
    parts |= {f"callback {type(callback).__name__}": callback for callback in _callbacks(experiment)}
    old = [path for path, part in parts.items() if part in seen]
    if old:
        raise ValueError(
            f"The method {name!r} returned for seed {seed} a part that an earlier run has trained: {old[0]}. Make the "
            "module, its student and the callbacks inside the method, so that every run starts anew."
        )
    for part in parts.values():
        seen.add(part)


def _has_trainable_parameters(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters(recurse=False))


def _callbacks(experiment: Experiment) -> list[L.Callback]:
    callbacks = experiment.trainer.get("callbacks") or []
    return [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks)


def make_trainer(experiment: Experiment, *, name: str, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """The experiment's Trainer, with ``callbacks`` added and one device.

    Raises:
        ValueError: If the experiment asks for more than one device.
    """
    defaults = {"enable_progress_bar": False, "enable_model_summary": False}
    arguments: dict[str, Any] = {**defaults, **experiment.trainer, "callbacks": [*_callbacks(experiment), *callbacks]}
    trainer = L.Trainer(**arguments, logger=False, default_root_dir=folder)
    if trainer.world_size > 1:
        # The other processes would run the whole script, and with it this comparison, from its start.
        raise ValueError(
            f"The method {name!r} trains on {trainer.world_size} devices; a comparison trains each run in one process. "
            "Pass `devices=1` to its Trainer."
        )
    return trainer


@contextlib.contextmanager
def raise_keyboard_interrupt(trainer: L.Trainer) -> Iterator[None]:
    """Undo what Lightning makes of Ctrl-C: a ``SystemExit``, or, in some versions, a plain return."""
    try:
        yield
    except SystemExit:
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def _trainable_parameters(module: L.LightningModule) -> int:
    student = getattr(module, "student", None)
    network = student if isinstance(student, nn.Module) else module
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
