"""From the losses of the terms to one scalar."""

from lightning_distill.weighting.depth import depth_weights
from lightning_distill.weighting.fixed import FixedWeights
from lightning_distill.weighting.multi_task import MultiTaskWeights
from lightning_distill.weighting.weighting import Weighting

__all__ = ["FixedWeights", "MultiTaskWeights", "Weighting", "depth_weights"]
