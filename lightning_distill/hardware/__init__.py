"""What a network costs on hardware: latency, energy, and shapes that vector units like."""

from lightning_distill.hardware.alignment import align_channels, is_aligned, simd_width
from lightning_distill.hardware.calibration import (
    calibrate_cost_model,
    calibration_workloads,
    fit_cost_model,
    measure_latency,
)
from lightning_distill.hardware.cost_model import PRESETS, CostModel, CostReport, LayerEstimate, cost_model
from lightning_distill.hardware.counting import LayerCost, count_costs, stored_bytes
from lightning_distill.hardware.energy import EnergyReport, energy
from lightning_distill.hardware.latency import compute_latency, effective_throughput, roofline_latency, speedup
from lightning_distill.hardware.layout import from_nchwc, pad_to_cacheline, to_nchwc
from lightning_distill.hardware.plot import plot_costs

__all__ = [
    "PRESETS",
    "CostModel",
    "CostReport",
    "EnergyReport",
    "LayerCost",
    "LayerEstimate",
    "align_channels",
    "calibrate_cost_model",
    "calibration_workloads",
    "compute_latency",
    "cost_model",
    "count_costs",
    "effective_throughput",
    "energy",
    "fit_cost_model",
    "from_nchwc",
    "is_aligned",
    "measure_latency",
    "pad_to_cacheline",
    "plot_costs",
    "roofline_latency",
    "simd_width",
    "speedup",
    "stored_bytes",
    "to_nchwc",
]
