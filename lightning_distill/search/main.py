"""Train trials that a sampler proposes, and keep them so that nothing is lost."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_distill.comparison.comparison import Goal
from lightning_distill.comparison.files import clear, open_folder, run_folder
from lightning_distill.comparison.runs import Method, run
from lightning_distill.comparison.table import duration, number
from lightning_distill.search.limits import Limits
from lightning_distill.search.result import Search, State, Trial
from lightning_distill.search.space import Label, Parameter, read_space
from lightning_distill.search.study import (
    FOLDER,
    PrunerName,
    SamplerName,
    make_sampler,
    open_study,
    refuse_running,
    running_elsewhere,
    search_lock,
    settings_of,
    take_trial,
)
from lightning_distill.search.trial import Build, train_trial

TRIALS = "trials"
STATES: dict[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}


def search(
    build: Build,
    space: Mapping[str, Any],
    *,
    folder: str | Path,
    metric: str | Sequence[str] = "val/accuracy",
    mode: Goal | Sequence[Goal] = "max",
    trials: int = 20,
    seeds: Sequence[int] | int = 1,
    sampler: SamplerName | None = None,
    pruner: PrunerName | None = None,
    seed: int = 0,
    start: Mapping[str, Any] | None = None,
    reference: Mapping[str, Method] | None = None,
    configuration: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    fresh: bool = False,
    title: str | None = None,
    console: Console | None = None,
) -> Search:
    """Find good settings by training ``trials`` of them and looking at the validation data.

    The test data are never looked at. The best of many trials looks better than it is; compare it with what you had
    before, with new seeds and on test data, by :func:`~lightning_distill.comparison.compare`.

    The search can be interrupted at any time, by SIGKILL too: called again, it goes on with the trial it was at, after
    that trial's last complete epoch, and proposes what it would have proposed. More trials can be asked for later.
    Several processes, on one machine, may share a folder; each takes the next trial. With one process the same ``seed``
    gives the same trials.

    The folder holds ``results.json``, ``results.csv``, the plots of :meth:`Search.plot`, and ``study/study.db``, an
    Optuna study called ``search``, for other tools.

    Args:
        build: Makes the experiment from settings and a seed.
        space: What may be varied; see :func:`~lightning_distill.search.read_space`.
        folder: Where everything is kept.
        metric: Name of the validation metric that counts, or of several: then the trials that are not dominated are
            searched for.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better; of each.
        trials: How many there shall be, with those that are in the folder.
        seeds: Seeds of the trainings of each trial, or how many; the mean over them counts.
        sampler: ``"tpe"`` (the default for one metric), ``"cmaes"`` (continuous settings, many trials), ``"nsga2"``
            (the default for several metrics) or ``"random"``.
        pruner: ``"median"`` (the default for one metric) stops a trial that is worse than the median of the others at
            the same validation, after four trials and from the second validation on; ``"halving"`` leaves a quarter at
            each rung of a ladder; ``"none"``. With several metrics nothing can be pruned.
        seed: Of the proposals.
        start: Settings of the first trial: those you have.
        reference: What is trained once before the trials, a teacher perhaps; see
            :func:`~lightning_distill.comparison.compare`.
        configuration: What describes the search, as JSON; that of the folder must be the same.
        limits: What a student may cost; a trial over it counts as pruned and is not trained.
        fresh: Delete the search in ``folder`` and start over.
        title: Heading of table and plots.
        console: Where progress is shown; by default the terminal.

    Raises:
        ValueError: If an argument has a bad value, or the folder holds another search.
    """
    parameters = read_space(space)
    metrics, modes = _metrics(metric, mode)
    sampler = sampler or ("tpe" if len(metrics) == 1 else "nsga2")
    pruner = pruner or ("median" if len(metrics) == 1 else "none")
    _check(metrics, sampler, pruner, trials, parameters)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"`seeds` must be one or more different numbers, or how many; got {seeds!r}.")
    first = _start(start, parameters)
    folder, console = Path(folder), console or Console()
    heading = "Search" if title is None else title
    described = {
        **(configuration or {}),
        "space": {parameter.name: _plain(space[parameter.name]) for parameter in parameters},
        "search": {
            "metric": metrics,
            "mode": modes,
            "seeds": numbers,
            "sampler": sampler,
            "pruner": pruner,
            "seed": seed,
            **({} if limits is None else {"limits": limits.as_dict()}),
        },
    }
    with _quiet_optuna():
        if fresh:
            refuse_running(folder)
            clear(folder)
        with search_lock(folder):
            open_folder(folder, [TRIALS, FOLDER, *(reference or {})], described)
        _train_references(reference or {}, folder, numbers[0], console)
        with search_lock(folder):
            study = open_study(folder, modes, pruner)

        def gather(importances: Mapping[str, float] | None = None) -> Search:
            found = tuple(
                _trial(trial, parameters) for trial in study.get_trials(deepcopy=False) if _started(trial, parameters)
            )
            return Search(folder, metrics, modes, tuple(numbers), found, heading, dict(importances or {}))

        with _progress(console) as progress:
            task = progress.add_task("", total=trials, completed=_finished(study))
            while (
                taken := take_trial(study, folder, parameters, trials=trials, sampler=sampler, seed=seed, start=first)
            ) is not None:
                trial, lock = taken
                done = _finished(study)
                progress.update(task, description=f"trial {trial.number}", completed=done)
                try:
                    _run_trial(
                        study,
                        trial,
                        build,
                        parameters,
                        folder=folder / TRIALS / f"trial{trial.number}",
                        seeds=numbers,
                        metrics=metrics,
                        prune=pruner != "none",
                        report=_reporter(progress, task, done),
                        limits=limits,
                    )
                finally:
                    lock.release()
                found = gather()
                with search_lock(folder):
                    found.save()
                progress.console.print(_line(found, trial.number), markup=False, highlight=False, soft_wrap=True)
            progress.update(task, description="done", completed=trials)
        result = gather(_importances(study) if len(metrics) == 1 else None)
        if others := running_elsewhere(study):
            console.print(f"{others} of the trials are with other processes; the last to finish shows them all.")
    with search_lock(folder):
        result.save()
        result.plot()
    return result


def _run_trial(
    study: optuna.Study,
    trial: optuna.trial.Trial,
    build: Build,
    parameters: Sequence[Parameter],
    **arguments: Any,
) -> None:
    """Train one trial and tell the study how it went; other errors leave it to be taken up again."""
    began = time.perf_counter()
    values: list[float] | None = None
    seconds: float | None = None
    state = TrialState.COMPLETE
    try:
        values, seconds = train_trial(build, settings_of(trial, parameters), trial, **arguments)
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except FloatingPointError as error:
        state = TrialState.FAIL
        trial.set_user_attr("note", str(error))
    trial.set_user_attr("seconds", time.perf_counter() - began if seconds is None else seconds)
    study.tell(trial, values, state)
    for checkpoint in arguments["folder"].rglob("*.ckpt"):
        checkpoint.unlink(missing_ok=True)
    if state is not TrialState.COMPLETE:
        shutil.rmtree(arguments["folder"], ignore_errors=True)


def _train_references(reference: Mapping[str, Method], folder: Path, seed: int, console: Console) -> None:
    """Train what is trained once; a second process waits for the first."""
    seen: weakref.WeakSet[Any] = weakref.WeakSet()
    with search_lock(folder):
        for name, method in reference.items():
            with console.status(f"{name}, which is trained once"):
                run(
                    method,
                    name=name,
                    seed=seed,
                    folder=run_folder(folder, name, None),
                    start_logger=lambda: None,
                    seen=seen,
                    report=lambda fraction: None,
                )


def _trial(frozen: optuna.trial.FrozenTrial, parameters: Sequence[Parameter]) -> Trial:
    values: tuple[float, ...] = ()
    if frozen.state == TrialState.COMPLETE:
        values = tuple(frozen.values)
    elif frozen.state == TrialState.PRUNED and frozen.intermediate_values:
        values = (frozen.intermediate_values[max(frozen.intermediate_values)],)
    return Trial(
        frozen.number,
        STATES[frozen.state],
        settings_of(frozen, parameters),
        values,
        float(frozen.user_attrs.get("seconds", math.nan)),
        len(frozen.intermediate_values),
        str(frozen.user_attrs.get("note", "")),
    )


def _started(frozen: optuna.trial.FrozenTrial, parameters: Sequence[Parameter]) -> bool:
    return all(parameter.name in frozen.params for parameter in parameters)


def _line(found: Search, trial_number: int) -> str:
    trial = next(trial for trial in found.trials if trial.number == trial_number)
    metrics = ", ".join(
        f"{metric} {number(value, metric)}" for metric, value in zip(found.metrics, trial.values, strict=False)
    )
    text = f"trial {trial.number}: {metrics}" if metrics else f"trial {trial.number}"
    if trial.state != "complete":
        how = trial.note if trial.note and trial.steps == 0 else f"after {trial.steps} validations"
        text += f" {trial.state}" + (f" {how}" if trial.state == "pruned" else "")
    text += f", {duration(trial.seconds)}"
    if len(found.metrics) == 1 and found.complete:
        text += f" (best {number(found.best.values[0], found.metrics[0])}, trial {found.best.number})"
    return text


def _importances(study: optuna.Study) -> dict[str, float]:
    """Optuna's importance of each setting; nothing where trials are few or all alike."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(complete) < 6 or len({trial.value for trial in complete}) < 2:
        return {}
    with warnings.catch_warnings(), contextlib.suppress(ImportError, RuntimeError, ValueError):
        warnings.simplefilter("ignore")  # that the interface may change
        found: dict[str, float] = optuna.importance.get_param_importances(study)
        return found
    return {}


def _metrics(metric: str | Sequence[str], mode: str | Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    metrics = (metric,) if isinstance(metric, str) else tuple(metric)
    modes = (mode,) * len(metrics) if isinstance(mode, str) else tuple(mode)
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"`metric` must be one name, or a list of different ones; got {metric!r}.")
    if len(modes) != len(metrics) or set(modes) - {"max", "min"}:
        raise ValueError(f"`mode` must be 'max' or 'min' for each of the metrics {list(metrics)}, got {mode!r}.")
    for name in metrics:
        if name.startswith("test"):
            raise ValueError(
                f"`metric` is {name!r}: settings that were chosen by test data cannot be tested any more. Choose by a "
                f"validation metric, such as {name.replace('test', 'val', 1)!r}."
            )
    return metrics, modes


def _check(
    metrics: Sequence[str], sampler: SamplerName, pruner: PrunerName, trials: int, parameters: Sequence[Parameter]
) -> None:
    make_sampler(sampler, 0, 0)
    if not trials >= 1:
        raise ValueError(f"`trials` must be at least 1, got {trials}.")
    if len(metrics) > 1 and pruner != "none":
        raise ValueError(
            f"`pruner` is {pruner!r}, but with several metrics no trial can be called hopeless; use 'none'."
        )
    if len(metrics) > 1 and sampler == "cmaes":
        raise ValueError("`sampler` is 'cmaes', which has one metric; use 'nsga2' or 'tpe' for several.")
    if sampler == "cmaes" and len([p for p in parameters if not p.choices]) < 2:
        raise ValueError("`sampler` is 'cmaes', which needs two or more ranges of numbers in `space`; use 'tpe'.")


def _start(start: Mapping[str, Any] | None, parameters: Sequence[Parameter]) -> dict[str, Label] | None:
    if start is None:
        return None
    names = [parameter.name for parameter in parameters]
    if set(start) != set(names):
        raise ValueError(f"`start` must have a value for each setting in `space`, {names}; got {list(start)}.")
    return {parameter.name: parameter.label_of(start[parameter.name]) for parameter in parameters}


def _plain(entry: Any) -> Any:
    """An entry of the space as JSON."""
    if isinstance(entry, Parameter):
        return {key: value for key, value in vars(entry).items() if value == value}  # without NaN
    return entry


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without Optuna's own lines about each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _finished(study: optuna.Study) -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _reporter(progress: Progress, task: TaskID, done: int) -> Callable[[float], None]:
    return lambda fraction: progress.update(task, completed=done + fraction)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f} of {task.total:.0f} trials"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600.0,
    )
