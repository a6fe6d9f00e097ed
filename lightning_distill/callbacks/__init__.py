"""Callbacks that turn a module's knobs."""

if __name__ == "callbacks":
    raise ImportError(
        "import lightning_distill.callbacks, not callbacks: the latter would be a second copy of each class"
    )

from lightning_distill.callbacks.adapter_mean_teacher import AdapterMeanTeacher
from lightning_distill.callbacks.balanced_magnitudes import BalancedMagnitudes
from lightning_distill.callbacks.bit_search import BitSearch
from lightning_distill.callbacks.block_sparsity import BlockSparsity
from lightning_distill.callbacks.cache_writer import CacheWriter
from lightning_distill.callbacks.compile import Compile
from lightning_distill.callbacks.curriculum import CurriculumResampling
from lightning_distill.callbacks.difficulty import TaskDifficulty
from lightning_distill.callbacks.ema_teacher import MeanTeacher
from lightning_distill.callbacks.feature_injection import FeatureInjection
from lightning_distill.callbacks.generations import GenerationEarlyStopping
from lightning_distill.callbacks.gradient_alignment import GradientAlignment
from lightning_distill.callbacks.gradient_injection import GradientInjection
from lightning_distill.callbacks.gradient_log import GradientLog
from lightning_distill.callbacks.gradient_variance import GradientVarianceTemperature
from lightning_distill.callbacks.gradnorm import GradNorm
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
from lightning_distill.callbacks.publish import PublishStudent
from lightning_distill.callbacks.quantization import AlternatingQuantization, QuantizationRamp
from lightning_distill.callbacks.scheduled_weights import ScheduledWeights
from lightning_distill.callbacks.selection import LogSelection
from lightning_distill.callbacks.snapshot_teacher import SnapshotTeacher
from lightning_distill.callbacks.soft_label_refinement import SoftLabelRefinement
from lightning_distill.callbacks.stage_checkpoint import StageCheckpoint
from lightning_distill.callbacks.teacher_pool import AdaptToCapability, PoolLog
from lightning_distill.callbacks.temperature import TemperatureAnnealing
from lightning_distill.callbacks.weight_report import WeightReport
from lightning_distill.callbacks.weighting import MGDA, CAGrad, PCGrad, UncertaintyWeighting
from lightning_distill.callbacks.write_sample import WriteSample

__all__ = [
    "MGDA",
    "AdaptToCapability",
    "AdapterMeanTeacher",
    "AlternatingQuantization",
    "BalancedMagnitudes",
    "BitSearch",
    "BlockSparsity",
    "CAGrad",
    "CacheWriter",
    "Compile",
    "CurriculumResampling",
    "DynamicLayerWeights",
    "FeatureInjection",
    "GenerationEarlyStopping",
    "GradNorm",
    "GradientAlignment",
    "GradientInjection",
    "GradientLog",
    "GradientVarianceTemperature",
    "LogSelection",
    "MeanTeacher",
    "OnPolicy",
    "PCGrad",
    "PerformanceHeadWeights",
    "PoolLog",
    "ProgressiveLayers",
    "PublishStudent",
    "QuantizationRamp",
    "RandomLayers",
    "ScheduledWeights",
    "SnapshotTeacher",
    "SoftLabelRefinement",
    "StageCheckpoint",
    "TaskDifficulty",
    "TemperatureAnnealing",
    "UncertaintyWeighting",
    "WeightReport",
    "WriteSample",
    "generated_batch",
    "progressive_layers",
    "sample_layers",
    "update_layer_weights",
]
