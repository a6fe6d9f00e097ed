"""All stages at once: each in a process of its own, taught by what the stage before has published so far."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from lightning_distill.callbacks.publish import PublishStudent, publish
from lightning_distill.comparison.files import slug
from lightning_distill.pipeline.manifest import (
    FOLLOWED,
    begin_manifest,
    check_manifest,
    finished_manifest,
)
from lightning_distill.pipeline.pipeline import Pipeline
from lightning_distill.pipeline.report import PipelineReport, pipeline_report
from lightning_distill.pipeline.running import alone, build_stage, first_process, restored, train_stage
from lightning_distill.pipeline.stage import Stage
from lightning_distill.stages import Earlier, EarlierStage, Following

CHOSEN = "LIGHTNING_DISTILL_STAGE"
PUBLISHED = "published"
OUTPUT = "output.txt"


def run_asynchronously(
    pipeline: Pipeline,
    folder: str | Path,
    *,
    seed: int = 0,
    publish_every: int | None = 100,
    check_every: int = 10,
    max_staleness: int | None = None,
    timeout: float = 3600.0,
    restarts: int = 3,
    console: Console | None = None,
) -> PipelineReport:
    """Train all stages of ``pipeline`` at the same time, each in a process of its own.

    A stage follows the weights that the one before publishes while it trains, and at the end those of its best
    checkpoint (:class:`~lightning_distill.teachers.FollowedTeacher`; chapter 12.3.2). The processes start this very
    program again, each for one stage, so call it under ``if __name__ == "__main__"``; the stages must build the same in
    each of them. They may be killed and started again one by one, also by hand and on other machines that share the
    folder, with the name of the stage in the environment variable ``LIGHTNING_DISTILL_STAGE``: each goes on where its
    newest checkpoint is. What a stage learnt from versions that are gone is not repeatable.

    No stage can begin from layers of one that is not finished, nor add to it (``"residual"``).

    Args:
        pipeline: With stages whose modules take their teachers from :class:`~lightning_distill.ProgressiveStage`,
            :func:`~lightning_distill.stages.stage_teacher` or :meth:`~lightning_distill.stages.EarlierStage.teacher`.
        folder: As :meth:`Pipeline.run` has it, with ``published/`` and ``output.txt`` in each stage's folder.
        seed: As :meth:`Pipeline.run` has it.
        publish_every: Optimizer steps between two published versions; ``None`` publishes the best checkpoint alone, so
            that each stage waits for the one before: the same as :meth:`Pipeline.run`.
        check_every: Training batches between two looks for a newer version.
        max_staleness: Training batches that one version may teach; then the student waits for a newer one. Default: it
            never waits.
        timeout: Longest wait for a version, seconds; a stage that waits longer fails, and is started again.
        restarts: How often each stage is started again after it failed.
        console: Where progress is told; by default the terminal.

    Returns:
        What each stage reached, kept and cost.

    Raises:
        RuntimeError: If a stage failed too often; the message has the end of its output.
        ValueError: If an argument is outside its range.
        BlockingIOError: If another process is at a pipeline in ``folder``, or at the stage of this process.
        SystemExit: In the processes of the stages, when they are done.
    """
    if publish_every is not None and not publish_every >= 1:
        raise ValueError(f"`publish_every` must be at least 1, got {publish_every}.")
    if not restarts >= 0:
        raise ValueError(f"`restarts` must not be negative, got {restarts}.")
    folder = Path(folder)
    if (chosen := os.environ.get(CHOSEN)) is not None:
        _run_one(pipeline, chosen, folder, seed, publish_every, (check_every, max_staleness, timeout))
        raise SystemExit(0)
    with alone(folder, "pipeline"):
        _run_all(pipeline, folder, restarts, console or Console())
    report = pipeline_report(folder, pipeline.stages)
    report.save()
    report.plot()
    return report


def _run_all(pipeline: Pipeline, folder: Path, restarts: int, console: Console) -> None:
    """Start a process for each stage that is not finished, and wait for all."""
    waiting = [stage for stage in pipeline.stages if finished_manifest(folder / slug(stage.name)) is None]
    threads = max((os.cpu_count() or 1) // max(len(waiting), 1), 1)  # more would wait for each other
    processes = {stage.name: _start(stage, folder, threads) for stage in waiting}
    failures = dict.fromkeys(processes, 0)
    try:
        while processes:
            time.sleep(0.2)
            for name, process in list(processes.items()):
                if (code := process.poll()) is None:
                    continue
                stage = next(stage for stage in waiting if stage.name == name)
                if code == 0:
                    del processes[name]
                    console.print(pipeline_report(folder, [stage]).stages[0].line(), markup=False)
                elif failures[name] < restarts:
                    failures[name] += 1
                    console.print(f"{name}: ended with {code}; started again, {failures[name]} of {restarts}")
                    processes[name] = _start(stage, folder, threads)
                else:
                    output = (folder / slug(name) / OUTPUT).read_text(errors="replace")
                    raise RuntimeError(
                        f"The stage {name!r} ended with {code}, {restarts + 1} times. Its last words:\n{output[-3000:]}"
                    )
    finally:
        _end(processes.values())


def _start(stage: Stage, folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """This program again, for one stage."""
    where = folder / slug(stage.name)
    where.mkdir(parents=True, exist_ok=True)
    with (where / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env={"OMP_NUM_THREADS": str(threads), **os.environ, CHOSEN: stage.name},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _end(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End these processes; one that waits for a teacher does not listen, and loses nothing by being killed."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _run_one(
    pipeline: Pipeline,
    name: str,
    folder: Path,
    seed: int,
    publish_every: int | None,
    following: tuple[int, int | None, float],
) -> None:
    """Train the stage ``name``, unless it is finished."""
    names = [stage.name for stage in pipeline.stages]
    if name not in names:
        raise ValueError(f"{CHOSEN} must be one of {', '.join(map(repr, names))}, got {name!r}.")
    earlier: list[EarlierStage] = []
    hashes: dict[str, str] = {}
    for stage in pipeline.stages:
        where = folder / slug(stage.name)
        experiment, configuration = build_stage(stage, Earlier(earlier), seed)
        check_manifest(where, stage.name, configuration, hashes)
        network, record = restored(experiment, where), finished_manifest(where)
        if stage.name == name:
            break
        if network is None or record is None:
            module: Any = experiment.module
            network = module.export()
            earlier.append(EarlierStage(stage.name, network, {}, Following(where / PUBLISHED, *following)))
            hashes[stage.name] = FOLLOWED
        else:
            metrics = {**record["metrics"], "parameters": float(record["parameters"])}
            earlier.append(EarlierStage(stage.name, network.requires_grad_(False).eval(), metrics))
            hashes[stage.name] = record["weights"]
    with alone(where, "stage"):
        if network is None:
            if first_process():
                begin_manifest(where, configuration, hashes)
            own: list[L.Callback] = []
            if publish_every is not None:
                own.append(PublishStudent(str(where / PUBLISHED), publish_every, last=False))
            network = train_stage(stage, experiment, where, callbacks=own)
            record = finished_manifest(where)
        assert record is not None
        if first_process():
            publish(network, where / PUBLISHED, record["steps"], finished=True)
