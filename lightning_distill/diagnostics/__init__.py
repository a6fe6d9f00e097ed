"""Theory of distillation, measured: functions that return a value, an interval and a number of observations.

Everything is computed on the CPU in float64, without gradients. Entropies and informations are in nats unless said.
"""

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
from lightning_distill.diagnostics.moving_average import (
    ConvergenceSlope,
    EMAReport,
    ema_convergence_slope,
    ema_report,
)
from lightning_distill.diagnostics.soft_labels import (
    CrossEntropyParts,
    DarkKnowledge,
    Unit,
    cross_entropy_parts,
    dark_knowledge,
)

__all__ = [
    "Convergence",
    "ConvergenceSlope",
    "CrossEntropyParts",
    "DarkKnowledge",
    "EMAReport",
    "Estimate",
    "GenerationBound",
    "GradientScale",
    "InformationGap",
    "RidgeGenerations",
    "SampleEfficiency",
    "TransferEfficiency",
    "Unit",
    "Verdict",
    "ban_operator",
    "bootstrap_mean",
    "convergence_diagnostics",
    "cross_entropy_parts",
    "dark_information_gap",
    "dark_information_gap_from_joint",
    "dark_knowledge",
    "ema_convergence_slope",
    "ema_report",
    "empirical_rademacher",
    "fit_generation_bound",
    "fixed_point_gap",
    "gradient_scale_curve",
    "ridge_generations",
    "sample_efficiency_curve",
    "sd_regularizer",
    "synergy",
    "transfer_efficiency",
]
