"""Train methods × seeds and compare them with the control group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableSet, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_distill.comparison.comparison import Comparison, Goal, check_metric
from lightning_distill.comparison.files import open_folder, run_folder, slug
from lightning_distill.comparison.runs import Method, finished_run, run
from lightning_distill.comparison.table import duration, number
from lightning_distill.comparison.weights_and_biases import Group, Mode, no_telemetry, open_group
from lightning_distill.locks import only_process


def compare(
    methods: Mapping[str, Method],
    *,
    control: str,
    folder: str | Path,
    seeds: Sequence[int] | int = 5,
    metric: str = "test/accuracy",
    mode: Goal = "max",
    reference: Mapping[str, Method] | None = None,
    configuration: Mapping[str, Any] | None = None,
    fresh: bool = False,
    wandb: Mode = "offline",
    title: str | None = None,
    console: Console | None = None,
) -> Comparison:
    """Train every method with every seed and compare them with the control group on the test data.

    Each run starts from ``seed_everything(seed)``, trains to its end and is tested with the weights of its last
    epoch: none is selected by its test result. The gain of a method is the mean over the seeds of its difference
    from the control with the same seed, with Student's paired t, p and 95 % confidence interval.

    The comparison can be interrupted at any time: called again, it trains what is missing, and a run that was in
    progress continues after its last complete epoch. More seeds and more methods can be asked for later. The order
    is seed by seed, so that what is there when it is interrupted can be compared.

    The folder holds for every run ``<method>/seed<k>/result.json`` with all test metrics, ``history.json`` with the
    validation metrics and, if the module has ``export(path)``, the ``student.safetensors`` (references:
    ``<name>/...``); for all of them ``results.json``, ``results.csv``, the plots of :meth:`Comparison.plot` and the
    offline W&B runs.

    Args:
        methods: By name, what to train for a seed; see :data:`Method`. Each run is trained in one process.
        control: Name of the method that the others are compared with: the same student and budget without what is
            being examined.
        folder: Where everything is kept; its name is the W&B group.
        seeds: The seeds, or how many (0, 1, …).
        metric: Name of the test metric that is compared. Changing it later needs no training.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        reference: What is trained once, with the first seed and before the methods, and shown without statistics. A
            teacher may stand here: the methods find its weights at :func:`student_path`.
        configuration: What describes the runs, as JSON. It is compared with that of the runs in the folder, so that
            runs with different settings are not mixed. New entries of its ``"methods"`` are no difference.
        fresh: Delete the comparison in ``folder`` and start over.
        wandb: ``"offline"`` logs a run per method and seed and one with the table below ``folder/wandb`` without any
            use of the network, ``"online"`` uploads them, ``"off"`` logs nothing.
        title: Heading of table and plots.
        console: Where progress is shown; by default the terminal.

    Returns:
        The comparison, saved and plotted; ``rich.print`` shows its table.

    Raises:
        ValueError: If names, seeds, ``metric`` or ``configuration`` do not fit; the metric is checked after the first
            run.
        TypeError: If a method cannot be called or returns no :class:`Experiment`.
        BlockingIOError: If another process is at a comparison in ``folder``.
    """
    references = dict(reference or {})
    _check_methods(methods, references, control)
    numbers = _check_seeds(seeds)
    if mode not in ("max", "min"):
        raise ValueError(f"`mode` must be 'max' or 'min', got {mode!r}.")
    folder = Path(folder)
    with only_process(folder, "comparison"):
        identifier = open_folder(folder, [*references, *methods], configuration, fresh=fresh)
        group = open_group(folder, identifier, wandb)
        console = console or Console()
        heading = f"Comparison with {control}" if title is None else title
        plan = [(name, numbers[0], method, run_folder(folder, name, None)) for name, method in references.items()]
        plan += [
            (name, seed, method, run_folder(folder, name, seed)) for seed in numbers for name, method in methods.items()
        ]
        results: list[dict[str, Any]] = []
        seen: MutableSet[Any] = weakref.WeakSet()

        def gather() -> Comparison:
            order = list(methods)
            runs = sorted(results[len(references) :], key=lambda found: (order.index(found["method"]), found["seed"]))
            return Comparison(folder, control, metric, mode, runs, results[: len(references)], heading)

        with no_telemetry(wandb), _progress(console) as progress:
            task = progress.add_task("", total=len(plan))
            for done, (name, seed, method, where) in enumerate(plan):
                progress.update(task, description=f"{name}, seed {seed}", completed=done)
                known = finished_run(where)
                report = _reporter(progress, task, done)
                result = known or _train(
                    method, name=name, seed=seed, folder=where, group=group, seen=seen, report=report
                )
                check_metric(result, metric)
                results.append(result)
                if known is None:
                    gather().save()
                    shown = number(float(result[metric]), metric)
                    progress.console.print(
                        f"{name}, seed {seed}: {metric} {shown}, {duration(result['seconds'])}",
                        markup=False,
                        highlight=False,
                    )
            progress.update(task, description="done", completed=len(plan))
        comparison = gather()
        comparison.save()
        comparison.plot()
        if group is not None:
            with no_telemetry(wandb):
                group.log_summary(comparison)
        return comparison


def _train(
    method: Method,
    *,
    name: str,
    seed: int,
    folder: Path,
    group: Group | None,
    seen: MutableSet[Any],
    report: Callable[[float], None],
) -> dict[str, Any]:
    """Run, with a W&B run that is finished however the training ends."""
    started: list[WandbLogger] = []

    def start_logger() -> Logger | None:
        if group is None:
            return None
        started.append(group.logger(name, seed))
        return started[0]

    exit_code = 1
    try:
        result = run(method, name=name, seed=seed, folder=folder, start_logger=start_logger, seen=seen, report=report)
        for logger in started:
            keys = ("parameters", "steps", "seconds", "cpu_seconds")
            logger.experiment.summary.update({key: result[key] for key in keys})
        exit_code = 0
    finally:
        for logger in started:
            logger.experiment.finish(exit_code=exit_code)
    return result


def _reporter(progress: Progress, task: Any, done: int) -> Callable[[float], None]:
    return lambda fraction: progress.update(task, completed=done + fraction)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f} of {task.total:.0f} runs"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=600.0,  # runs differ in speed, so the estimate needs several of them
    )


def _check_methods(methods: Mapping[str, Method], references: Mapping[str, Method], control: str) -> None:
    if not methods:
        raise ValueError("`methods` is empty; give the control and at least one method to compare with it.")
    if control not in methods:
        raise ValueError(f"`control` must be one of the methods, {', '.join(map(repr, methods))}; got {control!r}.")
    slugs: dict[str, str] = {}
    for name, method in [*methods.items(), *references.items()]:
        if not callable(method):
            raise TypeError(
                f"The method {name!r} must be a function that takes a seed and returns an `Experiment`, got "
                f"{type(method).__name__}."
            )
        taken = slugs.setdefault(slug(name), name)
        if taken != name or (name in methods and name in references):
            raise ValueError(f"{taken!r} and {name!r} would share the folder {slug(name)!r}; rename one of them.")


def _check_seeds(seeds: Sequence[int] | int) -> list[int]:
    if isinstance(seeds, int):
        if not seeds >= 1:
            raise ValueError(f"`seeds` must be at least 1 (5 or more for a test that can show anything), got {seeds}.")
        return list(range(seeds))
    numbers = list(seeds)
    if not numbers:
        raise ValueError("`seeds` is empty; give at least one seed, or how many.")
    for seed in numbers:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"`seeds` must be integers in [0, 2**32), got {seed!r}.")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"`seeds` has duplicates: {numbers}. The same run twice is no second measurement.")
    return numbers
