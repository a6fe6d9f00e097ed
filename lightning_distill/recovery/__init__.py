"""What brings back accuracy that quantization has cost, each usable alone on a network that is quantized already."""

from lightning_distill.recovery.batch_norm import Moments, Statistics, recalibrate_batch_norm
from lightning_distill.recovery.bias import bias_correction, correct_bias
from lightning_distill.recovery.correctors import (
    AttentionCorrector,
    LinearCorrector,
    OutputCalibrator,
    ResidualCorrector,
    fit_linear_corrector,
    linear_correction,
)
from lightning_distill.recovery.guard import RecoveryReport, RecoveryStep, bootstrap_refine, recover
from lightning_distill.recovery.injection import FeatureInjector, adaptive_alpha, feature_injection
from lightning_distill.recovery.recovered import recovered

__all__ = [
    "AttentionCorrector",
    "FeatureInjector",
    "LinearCorrector",
    "Moments",
    "OutputCalibrator",
    "RecoveryReport",
    "RecoveryStep",
    "ResidualCorrector",
    "Statistics",
    "adaptive_alpha",
    "bias_correction",
    "bootstrap_refine",
    "correct_bias",
    "feature_injection",
    "fit_linear_corrector",
    "linear_correction",
    "recalibrate_batch_norm",
    "recover",
    "recovered",
]
