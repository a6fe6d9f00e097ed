"""Theory of distillation, measured: functions that return a value, an interval and a number of observations.

Everything is computed on the CPU in float64, without gradients. Entropies and informations are in nats unless said.
"""

from lightning_distill.diagnostics.attention import AttentionProfile, attention_distance_profile
from lightning_distill.diagnostics.born_again import (
    Convergence,
    GenerationBound,
    RidgeGenerations,
    ban_operator,
    convergence_diagnostics,
    fit_generation_bound,
    fixed_point_gap,
    ridge_generations,
    sd_regularizer,
)
from lightning_distill.diagnostics.bottleneck import (
    LayerInformation,
    ib_layer_importance,
    ib_layer_importance_from_joint,
)
from lightning_distill.diagnostics.bound import implied_dimension, performance_bound
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
from lightning_distill.diagnostics.moving_average import ConvergenceSlope, EMAReport, ema_convergence_slope, ema_report
from lightning_distill.diagnostics.norms import NormInformation, norm_information
from lightning_distill.diagnostics.probes import linear_probe_profile
from lightning_distill.diagnostics.quantization import (
    JointError,
    QuantizationError,
    RecoveryBound,
    joint_error,
    quantization_error,
    recovery_bound_fit,
)
from lightning_distill.diagnostics.soft_labels import (
    CrossEntropyParts,
    DarkKnowledge,
    Unit,
    cross_entropy_parts,
    dark_knowledge,
)
from lightning_distill.diagnostics.stages import (
    Degradation,
    Landscape,
    Retention,
    StageInformation,
    landscape_smoothness,
    retention_compare,
    stage_degradation,
    stage_information,
)
from lightning_distill.diagnostics.teacher_pool import (
    PairingReport,
    complementarity,
    correlation_filter,
    diversity,
    output_correlation,
    pairing_report,
)

__all__ = [
    "AttentionProfile",
    "Conditioning",
    "Convergence",
    "ConvergenceSlope",
    "CrossEntropyParts",
    "CurriculumBenefit",
    "DarkKnowledge",
    "Degradation",
    "EMAReport",
    "Estimate",
    "GenerationBound",
    "GradientFlow",
    "GradientScale",
    "InformationGap",
    "JointError",
    "Landscape",
    "LayerInformation",
    "LayerProfile",
    "NormInformation",
    "PairingReport",
    "QuantizationError",
    "RecoveryBound",
    "Retention",
    "RidgeGenerations",
    "SampleEfficiency",
    "StageInformation",
    "SubnetAgreement",
    "TransferEfficiency",
    "Unit",
    "Verdict",
    "attention_distance_profile",
    "ban_operator",
    "bootstrap_mean",
    "compare_conditioning",
    "complementarity",
    "condition_number",
    "convergence_diagnostics",
    "correlation_filter",
    "cross_entropy_parts",
    "curriculum_benefit",
    "dark_information_gap",
    "dark_information_gap_from_joint",
    "dark_knowledge",
    "diversity",
    "ema_convergence_slope",
    "ema_report",
    "empirical_rademacher",
    "fit_generation_bound",
    "fixed_point_gap",
    "ggn_spectrum",
    "gradient_flow_profile",
    "gradient_scale_curve",
    "hessian",
    "hessian_spectrum",
    "ib_layer_importance",
    "ib_layer_importance_from_joint",
    "implied_dimension",
    "joint_error",
    "lanczos",
    "landscape_smoothness",
    "linear_probe_profile",
    "norm_information",
    "output_correlation",
    "pairing_report",
    "performance_bound",
    "quantization_error",
    "recovery_bound_fit",
    "retention_compare",
    "ridge_generations",
    "sample_efficiency_curve",
    "sd_regularizer",
    "stage_degradation",
    "stage_information",
    "subnet_agreement",
    "synergy",
    "transfer_efficiency",
]
