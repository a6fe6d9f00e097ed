"""The techniques as LightningModules."""

from lightning_distill.modules.base import DistillationModule
from lightning_distill.modules.kd import KD

__all__ = ["KD", "DistillationModule"]
