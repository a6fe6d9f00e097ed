"""Theory of distillation, measured: functions that return a value, an interval and a number of observations.

Everything is computed on the CPU in float64, without gradients. Entropies and informations are in nats unless said.
"""

from lightning_distill.diagnostics.curriculum import CurriculumBenefit, curriculum_benefit
from lightning_distill.diagnostics.estimates import Estimate, Verdict, bootstrap_mean
from lightning_distill.diagnostics.gradients import GradientScale, gradient_scale_curve
from lightning_distill.diagnostics.hypotheses import SampleEfficiency, empirical_rademacher, sample_efficiency_curve
from lightning_distill.diagnostics.information import (
    InformationGap,
    TransferEfficiency,
    dark_information_gap,
    dark_information_gap_from_joint,
    transfer_efficiency,
)
from lightning_distill.diagnostics.interaction import synergy
from lightning_distill.diagnostics.soft_labels import (
    CrossEntropyParts,
    DarkKnowledge,
    Unit,
    cross_entropy_parts,
    dark_knowledge,
)

__all__ = [
    "CrossEntropyParts",
    "CurriculumBenefit",
    "DarkKnowledge",
    "Estimate",
    "GradientScale",
    "InformationGap",
    "SampleEfficiency",
    "TransferEfficiency",
    "Unit",
    "Verdict",
    "bootstrap_mean",
    "cross_entropy_parts",
    "curriculum_benefit",
    "dark_information_gap",
    "dark_information_gap_from_joint",
    "dark_knowledge",
    "empirical_rademacher",
    "gradient_scale_curve",
    "sample_efficiency_curve",
    "synergy",
    "transfer_efficiency",
]
