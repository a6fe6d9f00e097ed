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

__all__ = [
    "EarlyExitNetwork",
    "ExitMeasurements",
    "ExitReport",
    "calibrate_exits",
    "choose_thresholds",
    "evaluate_exits",
    "exit_confidence",
    "exit_curve",
    "exit_indices",
    "exit_report",
    "measure_exits",
    "plot_exit_curve",
]
