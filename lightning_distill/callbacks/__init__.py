"""Callbacks that turn a module's knobs."""

if __name__ == "callbacks":
    raise ImportError(
        "import lightning_distill.callbacks, not callbacks: the latter would be a second copy of each class"
    )

from lightning_distill.callbacks.adapter_mean_teacher import AdapterMeanTeacher
from lightning_distill.callbacks.cache_writer import CacheWriter
from lightning_distill.callbacks.head_weights import PerformanceHeadWeights
from lightning_distill.callbacks.layer_matching import (
    DynamicLayerWeights,
    ProgressiveLayers,
    RandomLayers,
    progressive_layers,
    sample_layers,
    update_layer_weights,
)
from lightning_distill.callbacks.on_policy import OnPolicy, generated_batch
from lightning_distill.callbacks.temperature import TemperatureAnnealing
from lightning_distill.callbacks.write_sample import WriteSample

__all__ = [
    "AdapterMeanTeacher",
    "CacheWriter",
    "DynamicLayerWeights",
    "OnPolicy",
    "PerformanceHeadWeights",
    "ProgressiveLayers",
    "RandomLayers",
    "TemperatureAnnealing",
    "WriteSample",
    "generated_batch",
    "progressive_layers",
    "sample_layers",
    "update_layer_weights",
]
