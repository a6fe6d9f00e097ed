"""The trials on disk: which comes next, whose process has died, which are done."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.trial import TrialState

from lightning_distill.search.space import Label, Parameter

SamplerName = Literal["tpe", "cmaes", "nsga2", "random"]
PrunerName = Literal["median", "halving", "none"]
NAME = "search"
POPULATION = 10
FOLDER = "study"
DATABASE = "study.db"


def open_study(folder: Path, modes: Sequence[str], pruner: PrunerName) -> optuna.Study:
    """The study in ``folder``, made if there is none."""
    return optuna.create_study(
        study_name=NAME,
        storage=_storage(folder),
        directions=["maximize" if mode == "max" else "minimize" for mode in modes],
        pruner=_pruner(pruner),
        load_if_exists=True,
    )


def make_sampler(name: SamplerName, seed: int, trial: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial.

    Every trial has its own random numbers, from the search's seed and its number. A sampler with a state of its own
    would begin anew after a kill and propose the same settings again; all else that samplers know is in the storage.
    """
    number = int(np.random.SeedSequence([seed, trial]).generate_state(1)[0])
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=number)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=number, population_size=POPULATION)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=number)
    if name == "cmaes":
        independent = optuna.samplers.RandomSampler(seed=number)
        return optuna.samplers.CmaEsSampler(
            seed=number, independent_sampler=independent, warn_independent_sampling=False
        )
    raise ValueError(f"`sampler` must be 'tpe', 'cmaes', 'nsga2' or 'random', got {name!r}.")


def take_trial(
    study: optuna.Study,
    folder: Path,
    space: Sequence[Parameter],
    *,
    trials: int,
    sampler: SamplerName,
    seed: int,
    start: Mapping[str, Label] | None,
) -> tuple[optuna.trial.Trial, FileLock] | None:
    """The next trial for this process: one whose process has died, or a new one; ``None`` if there are enough.

    With it comes a lock on a file, to be released when the trial is over. The operating system does so if the process
    ends before, however it ends: that is how other processes know.

    Args:
        study: The study.
        folder: Of the search.
        space: What is varied.
        trials: How many there shall be.
        sampler: Who proposes.
        seed: Of the search.
        start: The settings of the first trial; proposed, like the others, by default.
    """
    with search_lock(folder):
        abandoned = _abandoned(study, folder)
        if abandoned is not None:
            number, lock = abandoned
            study.sampler = make_sampler(sampler, seed, number)
            trial = _take_up(study, folder, number)
        else:
            if start is not None and not study.get_trials(deepcopy=False):
                study.enqueue_trial(dict(start))
            waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            number = waiting[0].number if waiting else len(study.get_trials(deepcopy=False))
            if number >= trials:
                return None
            lock = _lock(folder, number)
            lock.acquire(timeout=0)  # before the trial is there for others to see
            study.sampler = make_sampler(sampler, seed, number)
            trial = study.ask()
        for parameter in space:  # with the lock: a proposal is complete, or its process has died
            _suggest(trial, parameter)
        return trial, lock


def search_lock(folder: Path) -> FileLock:
    """Held while the list of trials is read and changed."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    return FileLock(folder / FOLDER / "search.lock")


def settings_of(trial: optuna.trial.Trial | optuna.trial.FrozenTrial, space: Sequence[Parameter]) -> dict[str, Any]:
    """What a trial's configuration gets, by name."""
    return {parameter.name: parameter.value(trial.params[parameter.name]) for parameter in space}


def refuse_running(folder: Path) -> None:
    """Refuse to delete a search that a process is at.

    Raises:
        ValueError: If there is one.
    """
    for path in (folder / FOLDER).glob("*.lock"):  # of trials, and of the search while references are trained
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"Another process is at the search in {folder}, which `fresh=True` would delete. Stop it first, or "
                "choose another `folder`."
            ) from None
        lock.release()


def running_elsewhere(study: optuna.Study) -> int:
    """How many trials other processes are at."""
    return sum(trial.state == TrialState.RUNNING for trial in study.get_trials(deepcopy=False))


def _abandoned(study: optuna.Study, folder: Path) -> tuple[int, FileLock] | None:
    """The first trial that runs nowhere, with its lock."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lock = _lock(folder, trial.number)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return trial.number, lock
    return None


def _lock(folder: Path, number: int) -> FileLock:
    return FileLock(folder / FOLDER / f"trial{number}.lock")


def _take_up(study: optuna.Study, folder: Path, number: int) -> optuna.trial.Trial:
    """The running trial ``number``, to go on with."""
    storage = _storage(folder)
    study_id = storage.get_study_id_from_name(study.study_name)
    return optuna.trial.Trial(study, storage.get_trial_id_from_study_id_trial_number(study_id, number))


def _storage(folder: Path) -> optuna.storages.RDBStorage:
    path = folder / FOLDER / DATABASE
    path.parent.mkdir(parents=True, exist_ok=True)
    # several processes may write: wait for a minute before giving up
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})


def _suggest(trial: optuna.trial.Trial, parameter: Parameter) -> None:
    if parameter.choices:
        trial.suggest_categorical(parameter.name, parameter.labels)
    elif parameter.integer:
        step = {} if parameter.log else {"step": int(parameter.step or 1)}
        trial.suggest_int(parameter.name, int(parameter.low), int(parameter.high), log=parameter.log, **step)
    else:
        trial.suggest_float(parameter.name, parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def _pruner(name: PrunerName) -> optuna.pruners.BasePruner:
    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner()
    if name == "none":
        return optuna.pruners.NopPruner()
    raise ValueError(f"`pruner` must be 'median', 'halving' or 'none', got {name!r}.")
