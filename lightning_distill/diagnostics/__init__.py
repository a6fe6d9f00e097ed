"""Theory of distillation, measured: functions that return a value, an interval and a number of observations.

Everything is computed on the CPU in float64, without gradients. Entropies and informations are in nats unless said.
"""

from lightning_distill.diagnostics.attention import AttentionProfile, attention_distance_profile
from lightning_distill.diagnostics.bottleneck import (
    LayerInformation,
    ib_layer_importance,
    ib_layer_importance_from_joint,
)
from lightning_distill.diagnostics.conditioning import (
    Conditioning,
    compare_conditioning,
    condition_number,
    ggn_spectrum,
    hessian,
    hessian_spectrum,
    lanczos,
)
from lightning_distill.diagnostics.curriculum import CurriculumBenefit, curriculum_benefit
from lightning_distill.diagnostics.depth import GradientFlow, SubnetAgreement, gradient_flow_profile, subnet_agreement
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
from lightning_distill.diagnostics.layer_profile import LayerProfile
from lightning_distill.diagnostics.norms import NormInformation, norm_information
from lightning_distill.diagnostics.probes import linear_probe_profile
from lightning_distill.diagnostics.soft_labels import (
    CrossEntropyParts,
    DarkKnowledge,
    Unit,
    cross_entropy_parts,
    dark_knowledge,
)

__all__ = [
    "AttentionProfile",
    "Conditioning",
    "CrossEntropyParts",
    "CurriculumBenefit",
    "DarkKnowledge",
    "Estimate",
    "GradientFlow",
    "GradientScale",
    "InformationGap",
    "LayerInformation",
    "LayerProfile",
    "NormInformation",
    "SampleEfficiency",
    "SubnetAgreement",
    "TransferEfficiency",
    "Unit",
    "Verdict",
    "attention_distance_profile",
    "bootstrap_mean",
    "compare_conditioning",
    "condition_number",
    "cross_entropy_parts",
    "curriculum_benefit",
    "dark_information_gap",
    "dark_information_gap_from_joint",
    "dark_knowledge",
    "empirical_rademacher",
    "ggn_spectrum",
    "gradient_flow_profile",
    "gradient_scale_curve",
    "hessian",
    "hessian_spectrum",
    "ib_layer_importance",
    "ib_layer_importance_from_joint",
    "lanczos",
    "linear_probe_profile",
    "norm_information",
    "sample_efficiency_curve",
    "subnet_agreement",
    "synergy",
    "transfer_efficiency",
]
