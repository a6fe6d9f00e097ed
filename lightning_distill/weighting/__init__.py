"""From the losses of the terms to one scalar."""

from lightning_distill.weighting.auxiliary import (
    ExponentialDecay,
    LinearDecay,
    exponential_decay,
    linear_decay,
    performance_weights,
)
from lightning_distill.weighting.conflicts import cagrad_weights, pcgrad_weights
from lightning_distill.weighting.depth import depth_weights
from lightning_distill.weighting.fixed import FixedWeights
from lightning_distill.weighting.gradient_weights import GradientWeights
from lightning_distill.weighting.gradnorm import gradnorm_step, gradnorm_weights, training_rates
from lightning_distill.weighting.injection import (
    InjectionWeights,
    align_direction,
    align_projection,
    beta_decay,
    injection_weights,
)
from lightning_distill.weighting.live import Live, term_gradients
from lightning_distill.weighting.magnitudes import (
    inverse_magnitude_weights,
    quantization_error_moments,
    quantization_loss_weight,
    variance_balanced_weight,
)
from lightning_distill.weighting.min_norm import mgda_weights
from lightning_distill.weighting.multi_task import MultiTaskWeights
from lightning_distill.weighting.shared_layer import last_shared_layer, layer_parameters
from lightning_distill.weighting.staged import StagedWeight, staged_weight
from lightning_distill.weighting.uncertainty import UncertaintyWeights, uncertainty_weighted
from lightning_distill.weighting.weighting import Weighting

__all__ = [
    "ExponentialDecay",
    "FixedWeights",
    "GradientWeights",
    "InjectionWeights",
    "LinearDecay",
    "Live",
    "MultiTaskWeights",
    "StagedWeight",
    "UncertaintyWeights",
    "Weighting",
    "align_direction",
    "align_projection",
    "beta_decay",
    "cagrad_weights",
    "depth_weights",
    "exponential_decay",
    "gradnorm_step",
    "gradnorm_weights",
    "injection_weights",
    "inverse_magnitude_weights",
    "last_shared_layer",
    "layer_parameters",
    "linear_decay",
    "mgda_weights",
    "pcgrad_weights",
    "performance_weights",
    "quantization_error_moments",
    "quantization_loss_weight",
    "staged_weight",
    "term_gradients",
    "training_rates",
    "uncertainty_weighted",
    "variance_balanced_weight",
]
