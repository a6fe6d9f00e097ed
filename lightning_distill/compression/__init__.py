"""Smaller and faster students."""

from lightning_distill.compression.block_sparsity import block_mask, block_masks, cubic_sparsity
from lightning_distill.compression.blocks import BLOCK_SIZES, block_importance, block_norms, block_size, element_mask
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
from lightning_distill.compression.pruning import PrunedLayer, PruningReport, prune_channels, pruned
from lightning_distill.compression.sparse_files import SparseFile, read_block_sparse, write_block_sparse
from lightning_distill.compression.sparse_layers import LayerSparsity, SparsityReport, sparsity_report

__all__ = [
    "BLOCK_SIZES",
    "CascadeMeasurements",
    "ChannelGroup",
    "EarlyExitNetwork",
    "ExitMeasurements",
    "ExitReport",
    "LayerRank",
    "LayerSparsity",
    "LowRankReport",
    "PrecisionCascade",
    "PrunedLayer",
    "PruningReport",
    "SparseFile",
    "SparsityReport",
    "block_importance",
    "block_mask",
    "block_masks",
    "block_norms",
    "block_size",
    "calibrate_cascade",
    "calibrate_exits",
    "channel_groups",
    "choose_thresholds",
    "confidence_of_entropy",
    "cubic_sparsity",
    "dynamic_bits",
    "element_mask",
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
    "magnitude_importance",
    "measure_cascade",
    "measure_exits",
    "members_at_bits",
    "pass_costs",
    "plot_exit_curve",
    "plot_exit_curves",
    "prune_channels",
    "pruned",
    "read_block_sparse",
    "sparsity_report",
    "taylor_importance",
    "write_block_sparse",
]
