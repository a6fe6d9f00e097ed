"""Stages, one `Trainer.fit` after the other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import distributed

from lightning_distill.comparison.files import slug
from lightning_distill.hardware import CostModel
from lightning_distill.hardware import cost_model as find_cost_model
from lightning_distill.pipeline.deployed import measure_deployed
from lightning_distill.pipeline.manifest import (
    begin_manifest,
    check_manifest,
    finished_manifest,
)
from lightning_distill.pipeline.report import PipelineReport, pipeline_report
from lightning_distill.pipeline.running import alone, build_stage, first_process, restored, train_stage
from lightning_distill.pipeline.stage import Stage
from lightning_distill.stages import Earlier, EarlierStage

ONNX = "onnx"


class Pipeline:
    """Trainings that build on each other: the best checkpoint of each teaches the next.

    Each stage is one ``Trainer.fit`` with a Trainer of its own, so devices, precision and strategy are the Trainer's
    matter. Several processes may be started by the Trainer or by ``torchrun``; all stages then use as many. They must
    see the same folder, which belongs to them as long as they run: a second pipeline that is started there is refused.

    Kill it at any time and call it again: what is finished is not trained again, and the stage in progress goes on
    where its newest whole checkpoint is, with the random numbers of an uninterrupted run.

    Args:
        stages: In order; names must differ.

    Raises:
        ValueError: If there are no stages, or two would share a folder.

    Example:
        >>> stages = [Stage("teacher", build_teacher), Stage("student", build_student)]  # doctest: +SKIP
        >>> rich.print(Pipeline(stages).run("runs/pipeline"))  # doctest: +SKIP
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ValueError("`stages` is empty: a pipeline needs at least one stage.")
        taken: dict[str, str] = {}
        for stage in stages:
            other = taken.setdefault(slug(stage.name), stage.name)
            if other != stage.name or [s.name for s in stages].count(stage.name) > 1:
                raise ValueError(
                    f"The stages {other!r} and {stage.name!r} would share the folder {slug(stage.name)!r}; rename one."
                )
        self.stages = list(stages)

    def run(
        self,
        folder: str | Path,
        *,
        seed: int = 0,
        start_stage: str | None = None,
        onnx_samples: int | None = None,
        cost_model: str | Path | CostModel = "ideal",
        console: Console | None = None,
    ) -> PipelineReport:
        """Train what is not trained yet.

        The folder holds ``report.json`` and ``report.png``, and for every stage a folder with ``manifest.json`` (what
        is done, and from what), ``student.safetensors`` (the exported network with the weights of the best checkpoint),
        ``checkpoints/`` and ``logs/``.

        Args:
            folder: Where everything is kept.
            seed: ``seed_everything(seed)`` is called before each stage is built.
            start_stage: Train this stage and all that follow anew. What they had is moved aside, not deleted. Only in
                one process (before the others are started by a launcher).
            onnx_samples: Also write each stage's network as an ONNX file into the folder ``onnx``, and measure those on
                the last stage's test data, timed on so many samples; see
                :func:`~lightning_distill.pipeline.measure_deployed`.
            cost_model: For its predictions: ``"ideal"``, ``"compute"``, a file or a model.
            console: Where progress is told; by default the terminal.

        Returns:
            What each stage reached, kept and cost.

        Raises:
            ValueError: If ``start_stage`` is unknown or comes before a stage that was never finished, a stage was begun
                with another configuration or from another network, or asks for another number of processes than run.
            TypeError: If a stage builds no experiment, or its module cannot be exported.
            BlockingIOError: If another process is at a pipeline in ``folder``.
        """
        folder = Path(folder)
        if onnx_samples is not None and not onnx_samples >= 1:
            raise ValueError(f"`onnx_samples` must be at least 1, got {onnx_samples}.")
        model = find_cost_model(cost_model)
        with alone(folder, "pipeline"):
            if start_stage is not None:
                self._set_aside(folder, start_stage)
            return self._run(folder, seed, onnx_samples, model, console or Console())

    def _run(
        self, folder: Path, seed: int, onnx_samples: int | None, model: CostModel, console: Console
    ) -> PipelineReport:
        earlier: list[EarlierStage] = []
        hashes: dict[str, str] = {}
        for stage in self.stages:
            where = folder / slug(stage.name)
            experiment, configuration = build_stage(stage, Earlier(earlier), seed)
            check_manifest(where, stage.name, configuration, hashes)
            network = restored(experiment, where)
            trained = network is None
            if network is None:
                with alone(where, "stage"):  # one that was started by hand for this stage has not asked for the folder
                    if first_process():
                        begin_manifest(where, configuration, hashes)
                        console.print(f"{stage.name}: training", markup=False)
                    network = train_stage(stage, experiment, where)
            record = finished_manifest(where)
            assert record is not None
            hashes[stage.name] = record["weights"]
            metrics = {**record["metrics"], "parameters": float(record["parameters"])}
            earlier.append(EarlierStage(stage.name, network.requires_grad_(False).eval(), metrics))
            report = pipeline_report(folder, self.stages[: len(earlier)])
            if first_process():
                report.save()
                if trained:
                    console.print(report.stages[-1].line(), markup=False)
        if first_process():
            report.plot()
            if onnx_samples is not None:
                if experiment.datamodule is None:
                    raise ValueError("`onnx_samples` needs a data module in the last stage, whose test data it reads.")
                task = getattr(experiment.module, "task", None)
                networks = {stage.name: stage.network for stage in earlier}
                deployed = measure_deployed(
                    networks, experiment.datamodule, folder / ONNX, task=task, samples=onnx_samples, cost_model=model
                )
                report = replace(report, deployed=deployed)
        return report

    def _set_aside(self, folder: Path, start_stage: str) -> None:
        names = [stage.name for stage in self.stages]
        if start_stage not in names:
            raise ValueError(f"`start_stage` must be one of {', '.join(map(repr, names))}, got {start_stage!r}.")
        if distributed.is_torchelastic_launched() or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise ValueError(
                "`start_stage` moves files and works in one process only. Start the pipeline once with it and without "
                "a launcher, or move the folders of this stage and of those after it away."
            )
        if not first_process():  # a process that the Trainer started: the first one has done it
            return
        folders = [folder / slug(name) for name in names]
        position = names.index(start_stage)
        for name, where in zip(names[:position], folders, strict=False):
            if finished_manifest(where) is None:
                raise ValueError(
                    f"`start_stage` is {start_stage!r}, but the stage {name!r} before it is not finished. Start there."
                )
        for where in folders[position:]:
            if where.exists():
                number = 1
                while (aside := where.with_name(f"{where.name}.replaced-{number}")).exists():
                    number += 1
                where.rename(aside)
