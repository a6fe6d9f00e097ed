"""What a network costs on hardware: latency, energy, and shapes that vector units like."""

from lightning_distill.hardware.alignment import align_channels, is_aligned, simd_width
from lightning_distill.hardware.energy import EnergyReport, energy
from lightning_distill.hardware.latency import compute_latency, effective_throughput, roofline_latency, speedup

__all__ = [
    "EnergyReport",
    "align_channels",
    "compute_latency",
    "effective_throughput",
    "energy",
    "is_aligned",
    "roofline_latency",
    "simd_width",
    "speedup",
]
