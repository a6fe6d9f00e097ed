"""Callbacks that turn a module's knobs."""

if __name__ == "callbacks":
    raise ImportError(
        "import lightning_distill.callbacks, not callbacks: the latter would be a second copy of each class"
    )

from lightning_distill.callbacks.balanced_magnitudes import BalancedMagnitudes
from lightning_distill.callbacks.cache_writer import CacheWriter
from lightning_distill.callbacks.gradient_log import GradientLog
from lightning_distill.callbacks.gradnorm import GradNorm
from lightning_distill.callbacks.on_policy import OnPolicy, generated_batch
from lightning_distill.callbacks.scheduled_weights import ScheduledWeights
from lightning_distill.callbacks.temperature import TemperatureAnnealing
from lightning_distill.callbacks.weight_report import WeightReport
from lightning_distill.callbacks.weighting import MGDA, CAGrad, PCGrad, UncertaintyWeighting

__all__ = [
    "MGDA",
    "BalancedMagnitudes",
    "CAGrad",
    "CacheWriter",
    "GradNorm",
    "GradientLog",
    "OnPolicy",
    "PCGrad",
    "ScheduledWeights",
    "TemperatureAnnealing",
    "UncertaintyWeighting",
    "WeightReport",
    "generated_batch",
]
