"""Smaller and faster students."""

from lightning_distill.compression.early_exit import EarlyExitNetwork
from lightning_distill.compression.exit_calibration import (
    ExitMeasurements,
    calibrate_exits,
    evaluate_exits,
    measure_exits,
)
from lightning_distill.compression.exit_plot import plot_exit_curve
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
    "EarlyExitNetwork",
    "ExitMeasurements",
    "ExitReport",
    "LayerRank",
    "LowRankReport",
    "calibrate_exits",
    "choose_thresholds",
    "energy_rank",
    "evaluate_exits",
    "exit_confidence",
    "exit_curve",
    "exit_indices",
    "exit_report",
    "factorize",
    "factorized",
    "largest_rank",
    "low_rank_factors",
    "measure_exits",
    "plot_exit_curve",
]
