"""A pipeline described in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import rich

from lightning_distill.cli.commands import call_with_options
from lightning_distill.cli.comparison import (
    PARTS,
    ConfiguredMethod,
    experiment_parser,
    filled,
    merged,
    parse_method,
)
from lightning_distill.cli.unparsed import Unparsed
from lightning_distill.comparison import Experiment
from lightning_distill.pipeline import Pipeline, PipelineReport, Stage, run_asynchronously
from lightning_distill.pipeline.running import first_process
from lightning_distill.stages import Earlier

SETTINGS = ("monitor", "mode", "save_every_n_steps")


def run_pipeline(arguments: Sequence[str]) -> None:
    """Run ``pipeline -c PIPELINE.yaml`` and print the table."""
    _show(call_with_options(pipeline_configured, arguments))


def run_asynchronous_pipeline(arguments: Sequence[str]) -> None:
    """Run ``pipeline-async -c PIPELINE.yaml`` and print the table."""
    errors = (ValueError, TypeError, OSError, RuntimeError)
    _show(call_with_options(asynchronous_configured, arguments, errors=errors))


def _show(report: PipelineReport) -> None:
    if first_process():
        rich.print(report)
        if report.deployed is not None:
            rich.print(report.deployed)
        rich.print(f"Networks, checkpoints and plot are in [bold]{report.folder}[/bold].")


def pipeline_configured(
    stages: Unparsed,
    folder: str,
    common: Unparsed | None = None,
    monitor: str = "val/accuracy",
    mode: Literal["max", "min"] = "max",
    save_every_n_steps: int | None = None,
    seed: int = 0,
    start_stage: str | None = None,
    onnx_samples: int | None = None,
    cost_model: str = "ideal",
) -> PipelineReport:
    """Train the stages of a pipeline one after the other, each from the best checkpoint of those before.

    A stage is a mapping with ``model``, ``data`` and ``trainer``, each as in a configuration of ``fit``; it is merged
    into ``common`` (another ``class_path`` replaces what was there), and may have its own ``monitor``, ``mode`` and
    ``save_every_n_steps``. A module of the class ``ProgressiveStage`` takes its teacher from the stages before; any
    other may use ``lightning_distill.stages.stage_network`` or ``lightning_distill.stages.shortened`` as a network.

    Args:
        stages: Stages by name, in order.
        folder: Where everything is kept. Run it again after an interruption: what is finished is not trained again.
        common: What all stages share.
        monitor: Validation metric by which the best checkpoint of a stage is chosen.
        mode: Whether more (max) or less (min) of it is better.
        save_every_n_steps: Save in the middle of an epoch too.
        seed: Of everything random, in each stage.
        start_stage: Train this stage and all that follow anew; what they had is moved aside.
        onnx_samples: Also write every stage's network for ONNX Runtime and measure it there, timed on so many samples.
        cost_model: For its predictions: ideal, compute, or the file that `lightning-distill cost` has written.

    Raises:
        ValueError: If a stage's configuration is not valid; the message names the stage.
    """
    settings = {"monitor": monitor, "mode": mode, "save_every_n_steps": save_every_n_steps}
    pipeline = _configured(stages, folder, common, settings, seed)
    return pipeline.run(folder, seed=seed, start_stage=start_stage, onnx_samples=onnx_samples, cost_model=cost_model)


def asynchronous_configured(
    stages: Unparsed,
    folder: str,
    common: Unparsed | None = None,
    monitor: str = "val/accuracy",
    mode: Literal["max", "min"] = "max",
    save_every_n_steps: int | None = None,
    seed: int = 0,
    publish_every: int | None = 100,
    check_every: int = 10,
    max_staleness: int | None = None,
    timeout: float = 3600.0,
    restarts: int = 3,
) -> PipelineReport:
    """Train the stages of a pipeline all at once, each in a process of its own that follows the one before.

    The configuration is that of ``pipeline``. Kill any process: it is started again and goes on.

    Args:
        stages: Stages by name, in order.
        folder: Where everything is kept.
        common: What all stages share.
        monitor: Validation metric by which the best checkpoint of a stage is chosen.
        mode: Whether more (max) or less (min) of it is better.
        save_every_n_steps: Save in the middle of an epoch too.
        seed: Of everything random, in each stage.
        publish_every: Optimizer steps between two versions that a stage publishes; null for its best checkpoint alone.
        check_every: Training batches between two looks for a newer version.
        max_staleness: Training batches that one version may teach before the student waits; by default it never does.
        timeout: Longest wait, seconds.
        restarts: How often each stage is started again after it failed.

    Raises:
        ValueError: If a stage's configuration is not valid; the message names the stage.
    """
    settings = {"monitor": monitor, "mode": mode, "save_every_n_steps": save_every_n_steps}
    return run_asynchronously(
        _configured(stages, folder, common, settings, seed),
        folder,
        seed=seed,
        publish_every=publish_every,
        check_every=check_every,
        max_staleness=max_staleness,
        timeout=timeout,
        restarts=restarts,
    )


def _configured(
    stages: Unparsed, folder: str, common: Unparsed | None, settings: Mapping[str, Any], seed: int
) -> Pipeline:
    """The pipeline, every stage's configuration checked."""
    parser = experiment_parser()
    built = []
    for name, configuration in stages.items():
        described = merged(common or {}, configuration)
        own: dict[str, Any] = {**settings, **{key: described[key] for key in SETTINGS if key in described}}
        method = {key: value for key, value in described.items() if key not in SETTINGS}
        checked = filled(method, seed=seed, folder=folder)
        parse_method(parser, name, checked, kind="stage")  # before the first hour is spent
        built.append(
            Stage(
                name,
                _ConfiguredStage(name, method, folder, seed),
                **own,
                configuration={part: method[part] for part in PARTS if part in method},
            )
        )
    return Pipeline(built)


class _ConfiguredStage:
    """Builds a stage's experiment from its configuration."""

    def __init__(self, name: str, configuration: Mapping[str, Any], folder: str, seed: int) -> None:
        self.method = ConfiguredMethod(name, configuration, folder)
        self.seed = seed

    def __call__(self, earlier: Earlier) -> Experiment:
        """Build it; the pipeline has made the earlier stages known."""
        return self.method(self.seed)
