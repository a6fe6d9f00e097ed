"""Stages, one `Trainer.fit` after the other."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from rich.console import Console
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.callbacks.stage_checkpoint import StageCheckpoint, newest_checkpoint
from lightning_distill.comparison import Experiment
from lightning_distill.comparison.files import slug
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.comparison.runs import raise_keyboard_interrupt
from lightning_distill.export import write_network
from lightning_distill.files import content_hash
from lightning_distill.modes import inference
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.pipeline.manifest import Manifest
from lightning_distill.pipeline.report import PipelineReport, stage_report
from lightning_distill.pipeline.stage import Stage, describe
from lightning_distill.stages import Earlier, FinishedStage, earlier_stages
from lightning_distill.tasks import Classification
from lightning_distill.teachers import load_network

STUDENT = "student.safetensors"
CHECKPOINTS = "checkpoints"
OWNED = ("default_root_dir", "enable_checkpointing")


class Pipeline:
    """Trainings that build on each other: the best checkpoint of each teaches the next.

    Each stage is one ``Trainer.fit`` with a Trainer of its own, so devices, precision and strategy are the Trainer's
    matter. Several processes may be started by the Trainer or by ``torchrun``; all stages then use as many. They must
    see the same folder.

    Kill it at any time and call it again: what is finished is not trained again, and the stage in progress goes on
    where its newest whole checkpoint is, with the random numbers of an uninterrupted run.

    Args:
        stages: In order; names must differ.

    Raises:
        ValueError: If there are no stages, or two would share a folder.

    Example:
        >>> pipeline = Pipeline([Stage("teacher", build_teacher), Stage("student", build_student)])
        >>> rich.print(pipeline.run("runs/pipeline"))  # doctest: +SKIP
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        if not stages:
            raise ValueError("`stages` is empty: a pipeline needs at least one stage.")
        taken: dict[str, str] = {}
        for stage in stages:
            other = taken.setdefault(slug(stage.name), stage.name)
            if other is not stage.name or [s.name for s in stages].count(stage.name) > 1:
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
        console: Console | None = None,
    ) -> PipelineReport:
        """Train what is not trained yet.

        The folder holds ``manifest.json``, ``report.json`` and ``report.png``, and for every stage ``checkpoints/``,
        ``student.safetensors`` (the exported network with the weights of the best checkpoint) and ``logs/``.

        Args:
            folder: Where everything is kept.
            seed: ``seed_everything(seed)`` is called before each stage is built.
            start_stage: Train this stage and all that follow anew. What they had is moved aside, not deleted. Only in
                one process (before the others are started by a launcher).
            console: Where progress is told; by default the terminal.

        Returns:
            What each stage reached, kept and cost.

        Raises:
            ValueError: If ``start_stage`` is unknown or comes before a stage that was never finished, a stage was begun
                with another configuration or from another network, or asks for another number of processes than run.
            TypeError: If a stage builds no experiment, or its module cannot be exported.
        """
        folder = Path(folder)
        if start_stage is not None:
            self._set_aside(folder, start_stage)
        console = console or Console()
        finished: list[FinishedStage] = []
        hashes: dict[str, str] = {}
        for stage in self.stages:
            L.seed_everything(seed, workers=True, verbose=False)
            earlier = Earlier(finished)
            with earlier_stages(earlier):
                experiment = stage.build(earlier)
            _check_experiment(stage, experiment)
            where = folder / slug(stage.name)
            manifest = Manifest(folder)
            configuration = describe(experiment) if stage.configuration is None else stage.configuration
            manifest.check(stage.name, {**configuration, "seed": seed}, hashes)
            network = _restored(experiment, where, manifest, stage.name)
            if network is None:
                if _first_process():
                    manifest.begin(stage.name, {**configuration, "seed": seed}, hashes)
                    console.print(f"{stage.name}: training")
                network = _train(stage, experiment, where, manifest)
                manifest = Manifest(folder)
                self._tell(console, stage, manifest)
            record = manifest.record(stage.name)
            assert record is not None
            hashes[stage.name] = record["weights"]
            metrics = {**record["metrics"], "parameters": float(record["parameters"])}
            finished.append(FinishedStage(stage.name, network.requires_grad_(False).eval(), metrics))
            report = self._report(folder, manifest, len(finished))
            if _first_process():
                report.save()
        if _first_process():
            report.plot()
        return report

    def _set_aside(self, folder: Path, start_stage: str) -> None:
        names = [stage.name for stage in self.stages]
        if start_stage not in names:
            raise ValueError(f"`start_stage` must be one of {', '.join(map(repr, names))}, got {start_stage!r}.")
        if distributed.is_torchelastic_launched() or int(os.environ.get("SLURM_NTASKS", 1)) > 1:
            raise ValueError(
                "`start_stage` moves files and works in one process only. Start the pipeline once with it and without "
                "a launcher, or move the stage's folder away and take it out of manifest.json."
            )
        if not _first_process():  # a process that the Trainer started: the first one has done it
            return
        manifest = Manifest(folder)
        position = names.index(start_stage)
        if missing := [name for name in names[:position] if not manifest.finished(name)]:
            raise ValueError(
                f"`start_stage` is {start_stage!r}, but the stage {missing[0]!r} before it is not finished."
            )
        manifest.forget(names[position:])
        for name in names[position:]:
            where = folder / slug(name)
            if where.exists():
                number = 1
                while (aside := where.with_name(f"{where.name}.replaced-{number}")).exists():
                    number += 1
                where.rename(aside)

    def _tell(self, console: Console, stage: Stage, manifest: Manifest) -> None:
        record = manifest.record(stage.name)
        if _first_process() and record is not None:
            metric = record["metric"]
            reached = "no validation" if metric is None else f"{stage.monitor} {metric:.4f}"
            console.print(f"{stage.name}: {reached}, {record['steps']} steps, {record['seconds']:.0f} s", markup=False)

    def _report(self, folder: Path, manifest: Manifest, number: int) -> PipelineReport:
        done = self.stages[:number]
        records = [manifest.record(stage.name) or {} for stage in done]
        rows = [
            stage_report(stage.name, record, records[0], stage.monitor, stage.mode)
            for stage, record in zip(done, records, strict=True)
        ]
        return PipelineReport(folder, done[0].monitor, rows)


def _train(stage: Stage, experiment: Experiment, where: Path, manifest: Manifest) -> nn.Module:
    """Train or go on with a stage, and export the weights of its best checkpoint."""
    module: Any = experiment.module
    checkpoint = StageCheckpoint(where / CHECKPOINTS, stage.monitor, stage.mode, stage.save_every_n_steps)
    resume = newest_checkpoint(checkpoint.folder)
    with quiet_lightning():
        trainer = _make_trainer(stage, experiment, where, checkpoint)
        with raise_keyboard_interrupt(trainer):
            trainer.fit(module, datamodule=experiment.datamodule, ckpt_path=None if resume is None else resume.path)
        steps, seconds = trainer.global_step, checkpoint.seconds  # what follows reads the best checkpoint's state
        flops = _flops(module, trainer.train_dataloader)
        trainer.strategy.barrier()  # the first process may still be writing the last checkpoint's record
        best = trainer.strategy.broadcast(checkpoint.best())
        metrics: dict[str, float] = {}
        if best is not None and best.value is not None:
            # Reads the weights the way that the strategy wants it.
            (measured, *_) = trainer.validate(
                module, datamodule=experiment.datamodule, ckpt_path=best.path, verbose=False
            )
            metrics.update(measured)
        if _has_test_data(experiment.datamodule):
            (measured, *_) = trainer.test(module, datamodule=experiment.datamodule, verbose=False)
            metrics.update(measured)
    network: nn.Module = module.export()
    if trainer.is_global_zero:
        write_network(network, where / STUDENT, overwrite=True)
        manifest.finish(
            stage.name,
            weights=content_hash(where / STUDENT),
            metrics=metrics,
            metric=None if best is None else best.value,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            flops=flops,
            seconds=seconds,
            steps=steps,
        )
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()  # or the next stage would log into the same run
    trainer.strategy.barrier()
    return network


def _restored(experiment: Experiment, where: Path, manifest: Manifest, name: str) -> nn.Module | None:
    """What a finished stage has trained; ``None`` if it is not finished, or what it wrote is damaged."""
    if not manifest.finished(name):
        return None
    record = manifest.record(name)
    assert record is not None
    file = where / STUDENT
    if not file.exists() or content_hash(file) != record["weights"]:
        warnings.warn(
            f"{file} is damaged or gone: its content is not what the manifest says. It is made again from the stage's "
            "checkpoints.",
            stacklevel=3,
        )
        return None
    module: Any = experiment.module
    return load_network(module.export(), str(file))


def _make_trainer(stage: Stage, experiment: Experiment, where: Path, checkpoint: StageCheckpoint) -> L.Trainer:
    arguments: dict[str, Any] = {"enable_model_summary": False, **experiment.trainer}
    callbacks = arguments.pop("callbacks", None) or []
    callbacks = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks)
    arguments.setdefault("logger", CSVLogger(where, name="logs"))  # a new version for each attempt
    trainer = L.Trainer(**arguments, callbacks=[*callbacks, checkpoint], default_root_dir=where)
    running = _running_processes()
    if running > 1 and trainer.world_size != running:
        raise ValueError(
            f"The stage {stage.name!r} asks for {trainer.world_size} processes, but {running} are running. Let this "
            "stage and all after it use as many as the stages before."
        )
    return trainer


def _check_experiment(stage: Stage, experiment: Any) -> None:
    if not isinstance(experiment, Experiment):
        raise TypeError(
            f"The stage {stage.name!r} must build an `Experiment(module, datamodule, trainer)`, got "
            f"{type(experiment).__name__}."
        )
    if not callable(getattr(experiment.module, "export", None)):
        raise TypeError(
            f"The module of the stage {stage.name!r} must have `export()`, which gives the network for the next stage, "
            f"as the modules of this library have; got {type(experiment.module).__name__}."
        )
    if owned := sorted(set(OWNED) & set(experiment.trainer)):
        raise ValueError(
            f"The stage {stage.name!r} sets `{owned[0]}` of the Trainer, which belongs to the pipeline. Leave it out."
        )


def _flops(module: Any, loader: Any) -> float | None:
    """Operations of one sample, forward; ``None`` where they cannot be counted."""
    task = getattr(module, "task", None) or Classification()
    try:
        batch = first_samples(loader, 1)
        with module.untapped() as student, inference(student), FlopCounterMode(display=False) as counter:
            device = next(student.parameters()).device
            task.run(student, _moved(batch, device))
        return float(counter.get_total_flops()) / task.batch_size(batch)
    except Exception as error:  # a report is no reason to lose a training
        warnings.warn(f"The operations of the student were not counted: {error}", stacklevel=2)
        return None


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    return [_moved(value, device) for value in batch] if isinstance(batch, (list, tuple)) else batch


def _has_test_data(datamodule: L.LightningDataModule | None) -> bool:
    return datamodule is not None and type(datamodule).test_dataloader is not L.LightningDataModule.test_dataloader


def _first_process() -> bool:
    from lightning.pytorch.utilities import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def _running_processes() -> int:
    """How many processes run this script: those of a launcher, or those that an earlier stage has started."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1)) if distributed.is_torchelastic_launched() else 1
