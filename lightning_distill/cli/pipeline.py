"""A pipeline described in YAML."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import rich
from jsonargparse import ArgumentParser

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
from lightning_distill.pipeline import Pipeline, PipelineReport, Stage
from lightning_distill.pipeline.running import first_process
from lightning_distill.stages import Earlier

SETTINGS = ("monitor", "mode", "save_every_n_steps")


def run_pipeline(arguments: Sequence[str]) -> None:
    """Run ``pipeline -c PIPELINE.yaml`` and print the table."""
    parser = ArgumentParser(prog="lightning-distill pipeline", description=pipeline_configured.__doc__)
    parser.add_argument("-c", "--config", action="config", help="Path of a YAML file with the options below.")
    parser.add_function_arguments(pipeline_configured)
    options = parser.parse_args(list(arguments)[1:])
    options.pop("config")
    try:
        report = pipeline_configured(**options.as_dict())
    except (ValueError, TypeError, FileNotFoundError) as error:
        sys.exit(f"lightning-distill pipeline: {error}")
    _show(report)


def pipeline_configured(
    stages: Unparsed,
    folder: str,
    common: Unparsed | None = None,
    monitor: str = "val/accuracy",
    mode: Literal["max", "min"] = "max",
    save_every_n_steps: int | None = None,
    seed: int = 0,
    start_stage: str | None = None,
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

    Raises:
        ValueError: If a stage's configuration is not valid; the message names the stage.
    """
    parser = experiment_parser()
    built = []
    for name, configuration in stages.items():
        described = merged(common or {}, configuration)
        settings: dict[str, Any] = {"monitor": monitor, "mode": mode, "save_every_n_steps": save_every_n_steps}
        settings |= {key: described[key] for key in SETTINGS if key in described}
        method = {key: value for key, value in described.items() if key not in SETTINGS}
        checked = filled(method, seed=seed, folder=folder)
        parse_method(parser, name, checked, kind="stage")  # before the first hour is spent
        built.append(
            Stage(
                name,
                _ConfiguredStage(name, method, folder, seed),
                **settings,
                configuration={part: method[part] for part in PARTS if part in method},
            )
        )
    return Pipeline(built).run(folder, seed=seed, start_stage=start_stage)


class _ConfiguredStage:
    """Builds a stage's experiment from its configuration."""

    def __init__(self, name: str, configuration: Mapping[str, Any], folder: str, seed: int) -> None:
        self.method = ConfiguredMethod(name, configuration, folder)
        self.seed = seed

    def __call__(self, earlier: Earlier) -> Experiment:
        """Build it; the pipeline has made the earlier stages known."""
        return self.method(self.seed)


def _show(report: PipelineReport) -> None:
    if first_process():
        rich.print(report)
        rich.print(f"Networks, checkpoints and plot are in [bold]{report.folder}[/bold].")
