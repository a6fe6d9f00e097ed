"""One stage of a pipeline: build it, train it, or find what it has trained."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from safetensors.torch import load_file
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.callbacks.stage_checkpoint import StageCheckpoint, newest_checkpoint
from lightning_distill.comparison import Experiment
from lightning_distill.comparison.quiet import quiet_lightning
from lightning_distill.comparison.runs import raise_keyboard_interrupt
from lightning_distill.datamodules.tensors import InMemoryDataModule
from lightning_distill.export import write_network
from lightning_distill.files import content_hash
from lightning_distill.hardware import stored_bytes
from lightning_distill.locks import only_process
from lightning_distill.modes import inference
from lightning_distill.modules.first_samples import first_samples
from lightning_distill.pipeline.manifest import finish_manifest, finished_manifest
from lightning_distill.pipeline.stage import Stage, describe
from lightning_distill.sharding import assign
from lightning_distill.stages import Earlier, earlier_stages
from lightning_distill.tasks import Classification
from lightning_distill.teachers import load_network

STUDENT = "student.safetensors"
CHECKPOINTS = "checkpoints"
OWNED = ("default_root_dir", "enable_checkpointing")


def build_stage(stage: Stage, earlier: Earlier, seed: int) -> tuple[Experiment, dict[str, Any]]:
    """The experiment of ``stage``, and the configuration that it goes by.

    Raises:
        TypeError: If it builds no experiment, or the module cannot be exported.
        ValueError: If it sets what belongs to the pipeline.
    """
    L.seed_everything(seed, workers=True, verbose=False)
    with earlier_stages(earlier):
        experiment = stage.build(earlier)
    _check_experiment(stage, experiment)
    configuration = describe(experiment) if stage.configuration is None else stage.configuration
    return experiment, {**configuration, "monitor": stage.monitor, "mode": stage.mode, "seed": seed}


def train_stage(
    stage: Stage, experiment: Experiment, where: Path, *, callbacks: Sequence[L.Callback] = ()
) -> nn.Module:
    """Train or go on with a stage, and export the weights of its best checkpoint."""
    module: Any = experiment.module
    checkpoint = StageCheckpoint(where / CHECKPOINTS, stage.monitor, stage.mode, stage.save_every_n_steps)
    resume = newest_checkpoint(checkpoint.folder)
    with quiet_lightning():
        trainer = _make_trainer(stage, experiment, where, [*callbacks, checkpoint])
        with raise_keyboard_interrupt(trainer):
            trainer.fit(module, datamodule=experiment.datamodule, ckpt_path=None if resume is None else resume.path)
        steps, seconds = trainer.global_step, checkpoint.seconds  # what follows reads the best checkpoint's state
        flops = _flops(module, trainer.train_dataloader)
        trainer.strategy.barrier()  # the first process may still be writing the last checkpoint's record
        best = trainer.strategy.broadcast(checkpoint.best())
        metrics: dict[str, float] = {}
        value = None if best is None else best.value
        if best is None and steps == 0 and _has_validation_data(experiment.datamodule):  # nothing was to be trained
            (measured, *_) = trainer.validate(module, datamodule=experiment.datamodule, verbose=False) or [{}]
            metrics.update(measured)
            value = metrics.get(stage.monitor)
        elif best is not None and value is not None:
            # Reads the weights the way that the strategy wants it.
            (measured, *_) = trainer.validate(
                module, datamodule=experiment.datamodule, ckpt_path=best.path, verbose=False
            )
            metrics.update(measured)
        if has_test_data(experiment.datamodule):
            (measured, *_) = trainer.test(module, datamodule=experiment.datamodule, verbose=False)
            metrics.update(measured)
    network: nn.Module = module.export()
    if trainer.is_global_zero:
        write_network(network, where / STUDENT, overwrite=True)
        finish_manifest(
            where,
            weights=content_hash(where / STUDENT),
            metrics=metrics,
            metric=value,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            bytes=stored_bytes(network),
            flops=flops,
            seconds=seconds,
            steps=steps,
        )
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()  # or the next stage would log into the same run
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        # Go on with what the first process wrote: statistics of normalizations may be each process's own, and of a
        # network whose weights are spread only the first one has any.
        assign(network, load_file(where / STUDENT))
    return network


def restored(experiment: Experiment, where: Path) -> nn.Module | None:
    """What a finished stage has trained; ``None`` if it is not finished, or what it wrote is damaged."""
    if (record := finished_manifest(where)) is None:
        return None
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


def _make_trainer(stage: Stage, experiment: Experiment, where: Path, own: Sequence[L.Callback]) -> L.Trainer:
    arguments: dict[str, Any] = {"enable_model_summary": False, **experiment.trainer}
    callbacks = arguments.pop("callbacks", None) or []
    callbacks = [callbacks] if isinstance(callbacks, L.Callback) else list(callbacks)
    arguments.setdefault("logger", CSVLogger(where, name="logs"))  # a new version for each attempt
    trainer = L.Trainer(**arguments, callbacks=[*callbacks, *own], default_root_dir=where)
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


def _has_validation_data(datamodule: L.LightningDataModule | None) -> bool:
    return datamodule is not None and type(datamodule).val_dataloader is not L.LightningDataModule.val_dataloader


def has_test_data(datamodule: L.LightningDataModule | None) -> bool:
    """Whether there is something to test on."""
    if isinstance(datamodule, InMemoryDataModule):  # which has the method with and without such data
        return datamodule.splits.test is not None
    return datamodule is not None and type(datamodule).test_dataloader is not L.LightningDataModule.test_dataloader


def alone(where: Path, what: str) -> AbstractContextManager[None]:
    """Within this context nobody else starts the same ``what`` in ``where``; the first process sees to it for all.

    Raises:
        BlockingIOError: If somebody has.
    """
    other_machine = int(os.environ.get("NODE_RANK", 0)) > 0  # whose Trainer has not told its rank yet
    return only_process(where, what) if first_process() and not other_machine else nullcontext()


def first_process() -> bool:
    """Whether this is the process that writes: known before there is a Trainer, from what launchers set."""
    from lightning.pytorch.utilities import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def _running_processes() -> int:
    """How many processes run this script: those of a launcher, or those that an earlier stage has started."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1)) if distributed.is_torchelastic_launched() else 1
