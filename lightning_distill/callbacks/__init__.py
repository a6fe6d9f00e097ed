"""Callbacks that turn a module's knobs."""

if __name__ == "callbacks":
    raise ImportError(
        "import lightning_distill.callbacks, not callbacks: the latter would be a second copy of each class"
    )

from lightning_distill.callbacks.cache_writer import CacheWriter
from lightning_distill.callbacks.ema_teacher import MeanTeacher
from lightning_distill.callbacks.generations import GenerationEarlyStopping
from lightning_distill.callbacks.on_policy import OnPolicy, generated_batch
from lightning_distill.callbacks.publish import PublishStudent
from lightning_distill.callbacks.snapshot_teacher import SnapshotTeacher
from lightning_distill.callbacks.soft_label_refinement import SoftLabelRefinement
from lightning_distill.callbacks.temperature import TemperatureAnnealing

__all__ = [
    "CacheWriter",
    "GenerationEarlyStopping",
    "MeanTeacher",
    "OnPolicy",
    "PublishStudent",
    "SnapshotTeacher",
    "SoftLabelRefinement",
    "TemperatureAnnealing",
    "generated_batch",
]
