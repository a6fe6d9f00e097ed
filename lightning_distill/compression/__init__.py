"""Smaller and faster students."""

from lightning_distill.compression.cascade import (
    PrecisionCascade,
    confidence_of_entropy,
    dynamic_bits,
    members_at_bits,
    pass_costs,
)
from lightning_distill.compression.cascade_calibration import (
    CascadeMeasurements,
    calibrate_cascade,
    evaluate_cascade,
    measure_cascade,
)
from lightning_distill.compression.early_exit import EarlyExitNetwork
from lightning_distill.compression.exit_calibration import (
    ExitMeasurements,
    calibrate_exits,
    evaluate_exits,
    measure_exits,
)
from lightning_distill.compression.exit_plot import plot_exit_curve, plot_exit_curves
from lightning_distill.compression.exit_rules import (
    ExitReport,
    choose_thresholds,
    exit_confidence,
    exit_curve,
    exit_indices,
    exit_report,
)
from lightning_distill.compression.low_rank import (
    LayerRank,
    LowRankReport,
    energy_rank,
    factorize,
    factorized,
    largest_rank,
    low_rank_factors,
)

__all__ = [
    "CascadeMeasurements",
    "EarlyExitNetwork",
    "ExitMeasurements",
    "ExitReport",
    "LayerRank",
    "LowRankReport",
    "PrecisionCascade",
    "calibrate_cascade",
    "calibrate_exits",
    "choose_thresholds",
    "confidence_of_entropy",
    "dynamic_bits",
    "energy_rank",
    "evaluate_cascade",
    "evaluate_exits",
    "exit_confidence",
    "exit_curve",
    "exit_indices",
    "exit_report",
    "factorize",
    "factorized",
    "largest_rank",
    "low_rank_factors",
    "measure_cascade",
    "measure_exits",
    "members_at_bits",
    "pass_costs",
    "plot_exit_curve",
    "plot_exit_curves",
]
