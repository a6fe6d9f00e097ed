"""What a student can be trained to minimise."""

from lightning_distill.losses.auxiliary_heads import AuxiliaryHeads, auxiliary_head, head_tier, head_width
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
from lightning_distill.losses.deep_supervision import LayerwiseKD, OnHeads, deep_supervision_loss, layerwise_kd
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
from lightning_distill.losses.self_features import (
    FeatureAlignment,
    HierarchicalSelfKD,
    PairedLayers,
    alignment_pairs,
    hierarchical_pairs,
)
from lightning_distill.losses.soft_targets import (
    SoftTargets,
    jensen_shannon_divergence,
    kl_divergence,
    skewed_kl_divergence,
    soft_cross_entropy,
    softened_log_softmax,
)
from lightning_distill.losses.targets import CrossEntropy, SquaredError, TeacherSquaredError, cross_entropy
from lightning_distill.losses.term import Term, reduce_items, teacher_outputs
from lightning_distill.losses.top_k import top_k_log_probs, topk_kl
from lightning_distill.losses.top_k_targets import SparseKD, TopKTargets
from lightning_distill.losses.transforms import LinearTransform, MLPTransform, channels_last, resize

__all__ = [
    "DIST",
    "DKD",
    "AdaptiveTokenWeight",
    "AuxiliaryHeads",
    "CrossEntropy",
    "CrossTaskTargets",
    "EntropyTokenWeight",
    "FeatureAlignment",
    "FeatureMatching",
    "FusedKD",
    "FusedLoss",
    "HierarchicalSelfKD",
    "KDItems",
    "LayerwiseKD",
    "Lazy",
    "LinearTransform",
    "LogitStandardization",
    "MLPTransform",
    "Mixup",
    "OnHeads",
    "PairedLayers",
    "SampledKD",
    "SampledTargets",
    "SoftTargets",
    "SparseKD",
    "SquaredError",
    "TeacherSquaredError",
    "Term",
    "TopKTargets",
    "UniversalLogitDistance",
    "adaptive_beta",
    "alignment_pairs",
    "auxiliary_head",
    "channels_last",
    "cross_entropy",
    "cross_task_kd",
    "decoupled_divergence",
    "deep_supervision_loss",
    "effective_share",
    "fused_linear_kd",
    "fused_linear_kd_items",
    "head_tier",
    "head_width",
    "hierarchical_pairs",
    "inter_class_distance",
    "intra_class_distance",
    "is_unbuilt",
    "jensen_shannon_divergence",
    "kl_divergence",
    "layerwise_kd",
    "mixup",
    "non_target_divergence",
    "per_item",
    "reduce_items",
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
    "top_k_log_probs",
    "topk_kl",
    "universal_logit_distance",
]
