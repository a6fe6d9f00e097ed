"""What a network costs on hardware: latency, energy, and shapes that vector units like."""

from lightning_distill.hardware.alignment import align_channels, is_aligned, simd_width
from lightning_distill.hardware.bit_operations import bit_operations
from lightning_distill.hardware.calibration import (
    calibrate_cost_model,
    fit_cost_model,
    fit_kernels,
    measure_latency,
)
from lightning_distill.hardware.cost_model import PRESETS, CostModel, CostReport, LayerEstimate, cost_model
from lightning_distill.hardware.counting import LayerCost, count_costs, stored_bytes
from lightning_distill.hardware.deployment import DeploymentReport, DeploymentRow, deployment_check
from lightning_distill.hardware.energy import EnergyReport, energy
from lightning_distill.hardware.fusion import Fusion, find_fusions, fold_batch_norms
from lightning_distill.hardware.kernels import Kernel, Use, kernel_use
from lightning_distill.hardware.latency import compute_latency, effective_throughput, roofline_latency, speedup
from lightning_distill.hardware.layout import from_nchwc, pad_to_cacheline, to_nchwc
from lightning_distill.hardware.onnx_calibration import calibrate_onnx, time_onnx
from lightning_distill.hardware.operations import Convolution, Operation
from lightning_distill.hardware.plot import plot_costs
from lightning_distill.hardware.targets import TARGETS, Arithmetic, Target, target, tile_bytes, tile_size
from lightning_distill.hardware.workloads import calibration_networks, calibration_workloads

__all__ = [
    "PRESETS",
    "TARGETS",
    "Arithmetic",
    "Convolution",
    "CostModel",
    "CostReport",
    "DeploymentReport",
    "DeploymentRow",
    "EnergyReport",
    "Fusion",
    "Kernel",
    "LayerCost",
    "LayerEstimate",
    "Operation",
    "Target",
    "Use",
    "align_channels",
    "bit_operations",
    "calibrate_cost_model",
    "calibrate_onnx",
    "calibration_networks",
    "calibration_workloads",
    "compute_latency",
    "cost_model",
    "count_costs",
    "deployment_check",
    "effective_throughput",
    "energy",
    "find_fusions",
    "fit_cost_model",
    "fit_kernels",
    "fold_batch_norms",
    "from_nchwc",
    "is_aligned",
    "kernel_use",
    "measure_latency",
    "pad_to_cacheline",
    "plot_costs",
    "roofline_latency",
    "simd_width",
    "speedup",
    "stored_bytes",
    "target",
    "tile_bytes",
    "tile_size",
    "time_onnx",
    "to_nchwc",
]
