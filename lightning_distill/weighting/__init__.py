"""From the losses of the terms to one scalar."""

from lightning_distill.weighting.auxiliary import (
    ExponentialDecay,
    LinearDecay,
    exponential_decay,
    linear_decay,
    performance_weights,
)
from lightning_distill.weighting.depth import depth_weights
from lightning_distill.weighting.fixed import FixedWeights
from lightning_distill.weighting.multi_task import MultiTaskWeights
from lightning_distill.weighting.weighting import Weighting

__all__ = [
    "ExponentialDecay",
    "FixedWeights",
    "LinearDecay",
    "MultiTaskWeights",
    "Weighting",
    "depth_weights",
    "exponential_decay",
    "linear_decay",
    "performance_weights",
]
