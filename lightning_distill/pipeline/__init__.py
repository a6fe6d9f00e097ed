"""Progressive distillation: stages that build on each other."""

from lightning_distill.pipeline.asynchronous import run_asynchronously
from lightning_distill.pipeline.deployed import DeployedNetwork, DeployedReport, measure_deployed
from lightning_distill.pipeline.pipeline import Pipeline
from lightning_distill.pipeline.report import PipelineReport, StageReport
from lightning_distill.pipeline.stage import Stage, describe

__all__ = [
    "DeployedNetwork",
    "DeployedReport",
    "Pipeline",
    "PipelineReport",
    "Stage",
    "StageReport",
    "describe",
    "measure_deployed",
    "run_asynchronously",
]
