"""What a student can be trained to minimise."""

from lightning_distill.losses.big_vocabulary import (
    FusedLoss,
    KDItems,
    fused_linear_kd,
    fused_linear_kd_items,
    sparse_kd,
    sparse_kd_items,
)
from lightning_distill.losses.cross_task import CrossTaskTargets, cross_task_kd
from lightning_distill.losses.cross_tokenizer import UniversalLogitDistance, universal_logit_distance
from lightning_distill.losses.dark_knowledge import (
    ConfidenceWeights,
    PermutedTargets,
    confidence_weights,
    permute_other_classes,
)
from lightning_distill.losses.dist import DIST, inter_class_distance, intra_class_distance
from lightning_distill.losses.dkd import DKD, decoupled_divergence, non_target_divergence, target_divergence
from lightning_distill.losses.features import FeatureMatching
from lightning_distill.losses.fused import FusedKD
from lightning_distill.losses.items import per_item
from lightning_distill.losses.language_modelling import (
    AdaptiveTokenWeight,
    EntropyTokenWeight,
    SampledKD,
    SampledTargets,
    adaptive_beta,
    effective_share,
    sampled_kd,
)
from lightning_distill.losses.lazy import Lazy, is_unbuilt
from lightning_distill.losses.logit_standardization import LogitStandardization, standardize_logits
from lightning_distill.losses.mixup import Mixup, mixup
from lightning_distill.losses.refinement import KnownOutputs, RefinedTargets, refined_cross_entropy
from lightning_distill.losses.soft_targets import (
    SoftTargets,
    jensen_shannon_divergence,
    kl_divergence,
    skewed_kl_divergence,
    soft_cross_entropy,
    softened_log_softmax,
)
from lightning_distill.losses.targets import CrossEntropy, SquaredError, TeacherSquaredError, cross_entropy
from lightning_distill.losses.temporal import PastOutputs, TemporalTargets, temporal_kd
from lightning_distill.losses.term import Term, reduce_items, teacher_outputs
from lightning_distill.losses.top_k import top_k_log_probs, topk_kl
from lightning_distill.losses.top_k_targets import SparseKD, TopKTargets
from lightning_distill.losses.transforms import LinearTransform, MLPTransform, channels_last, resize

__all__ = [
    "DIST",
    "DKD",
    "AdaptiveTokenWeight",
    "ConfidenceWeights",
    "CrossEntropy",
    "CrossTaskTargets",
    "EntropyTokenWeight",
    "FeatureMatching",
    "FusedKD",
    "FusedLoss",
    "KDItems",
    "KnownOutputs",
    "Lazy",
    "LinearTransform",
    "LogitStandardization",
    "MLPTransform",
    "Mixup",
    "PastOutputs",
    "PermutedTargets",
    "RefinedTargets",
    "SampledKD",
    "SampledTargets",
    "SoftTargets",
    "SparseKD",
    "SquaredError",
    "TeacherSquaredError",
    "TemporalTargets",
    "Term",
    "TopKTargets",
    "UniversalLogitDistance",
    "adaptive_beta",
    "channels_last",
    "confidence_weights",
    "cross_entropy",
    "cross_task_kd",
    "decoupled_divergence",
    "effective_share",
    "fused_linear_kd",
    "fused_linear_kd_items",
    "inter_class_distance",
    "intra_class_distance",
    "is_unbuilt",
    "jensen_shannon_divergence",
    "kl_divergence",
    "mixup",
    "non_target_divergence",
    "per_item",
    "permute_other_classes",
    "reduce_items",
    "refined_cross_entropy",
    "resize",
    "sampled_kd",
    "skewed_kl_divergence",
    "soft_cross_entropy",
    "softened_log_softmax",
    "sparse_kd",
    "sparse_kd_items",
    "standardize_logits",
    "target_divergence",
    "teacher_outputs",
    "temporal_kd",
    "top_k_log_probs",
    "topk_kl",
    "universal_logit_distance",
]
