"""Smaller and faster students."""

from lightning_distill.compression.channel_graph import channel_groups
from lightning_distill.compression.channel_importance import magnitude_importance, taylor_importance
from lightning_distill.compression.channels import ChannelGroup
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
from lightning_distill.compression.pruning import PrunedLayer, PruningReport, prune_channels, pruned

__all__ = [
    "ChannelGroup",
    "EarlyExitNetwork",
    "ExitMeasurements",
    "ExitReport",
    "LayerRank",
    "LowRankReport",
    "PrunedLayer",
    "PruningReport",
    "calibrate_exits",
    "channel_groups",
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
    "magnitude_importance",
    "measure_exits",
    "plot_exit_curve",
    "prune_channels",
    "pruned",
    "taylor_importance",
]
