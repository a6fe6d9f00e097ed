"""What a student can be trained to minimise."""

from lightning_distill.losses.attention import (
    ROW_DISTANCES,
    AttentionMatching,
    AttentionSelfDistillation,
    LocalGlobal,
    SparseAttention,
    sparse_thresholds,
)
from lightning_distill.losses.auxiliary_heads import AuxiliaryHeads, auxiliary_head, head_tier, head_width
from lightning_distill.losses.big_vocabulary import (
    FusedLoss,
    KDItems,
    fused_linear_cross_entropy,
    fused_linear_kd,
    fused_linear_kd_items,
    sparse_kd,
    sparse_kd_items,
)
from lightning_distill.losses.contrastive import (
    ContrastiveMatching,
    InfoNCE,
    PerturbationInfoNCE,
    TemporalInfoNCE,
    info_nce,
)
from lightning_distill.losses.cross_task import CrossTaskTargets, cross_task_kd
from lightning_distill.losses.cross_tokenizer import UniversalLogitDistance, universal_logit_distance
from lightning_distill.losses.dark_knowledge import (
    ConfidenceWeights,
    PermutedTargets,
    confidence_weights,
    permute_other_classes,
)
from lightning_distill.losses.deep_supervision import LayerwiseKD, OnHeads, deep_supervision_loss, layerwise_kd
from lightning_distill.losses.dist import DIST, inter_class_distance, intra_class_distance
from lightning_distill.losses.distances import (
    CKA,
    CRD,
    DISTANCES,
    MMD,
    RKD,
    VID,
    ContentPosition,
    Correlation,
    HierarchicalContext,
    LowRank,
    PooledSequence,
    Procrustes,
    Spectrum,
)
from lightning_distill.losses.dkd import DKD, decoupled_divergence, non_target_divergence, target_divergence
from lightning_distill.losses.embeddings import (
    EmbeddingDistance,
    PairSimilarity,
    SimilarityMatching,
    embedding_distance,
    pair_similarity,
    similarity_matching,
)
from lightning_distill.losses.ensemble_targets import EnsembleTargets, mean_kl_divergence
from lightning_distill.losses.features import FeatureMatching
from lightning_distill.losses.fused import FusedCrossEntropy, FusedKD
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
from lightning_distill.losses.regularizers import (
    ActivationSparsity,
    Decorrelation,
    LipschitzPenalty,
    activation_sparsity,
    decorrelation,
    lipschitz_penalty,
)
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
from lightning_distill.losses.temporal import PastOutputs, TemporalTargets, temporal_kd
from lightning_distill.losses.term import Term, reduce_items, teacher_outputs
from lightning_distill.losses.top_k import top_k_log_probs, topk_kl
from lightning_distill.losses.top_k_targets import SparseKD, TopKTargets
from lightning_distill.losses.transforms import LinearTransform, MLPTransform, channels_last, resize

__all__ = [
    "CKA",
    "CRD",
    "DIST",
    "DISTANCES",
    "DKD",
    "MMD",
    "RKD",
    "ROW_DISTANCES",
    "VID",
    "ActivationSparsity",
    "AdaptiveTokenWeight",
    "AttentionMatching",
    "AttentionSelfDistillation",
    "AuxiliaryHeads",
    "ConfidenceWeights",
    "ContentPosition",
    "ContrastiveMatching",
    "Correlation",
    "CrossEntropy",
    "CrossTaskTargets",
    "Decorrelation",
    "EmbeddingDistance",
    "EnsembleTargets",
    "EntropyTokenWeight",
    "FeatureAlignment",
    "FeatureMatching",
    "FusedCrossEntropy",
    "FusedKD",
    "FusedLoss",
    "HierarchicalContext",
    "HierarchicalSelfKD",
    "InfoNCE",
    "KDItems",
    "KnownOutputs",
    "LayerwiseKD",
    "Lazy",
    "LinearTransform",
    "LipschitzPenalty",
    "LocalGlobal",
    "LogitStandardization",
    "LowRank",
    "MLPTransform",
    "Mixup",
    "OnHeads",
    "PairSimilarity",
    "PairedLayers",
    "PastOutputs",
    "PermutedTargets",
    "PerturbationInfoNCE",
    "PooledSequence",
    "Procrustes",
    "RefinedTargets",
    "SampledKD",
    "SampledTargets",
    "SimilarityMatching",
    "SoftTargets",
    "SparseAttention",
    "SparseKD",
    "Spectrum",
    "SquaredError",
    "TeacherSquaredError",
    "TemporalInfoNCE",
    "TemporalTargets",
    "Term",
    "TopKTargets",
    "UniversalLogitDistance",
    "activation_sparsity",
    "adaptive_beta",
    "alignment_pairs",
    "auxiliary_head",
    "channels_last",
    "confidence_weights",
    "cross_entropy",
    "cross_task_kd",
    "decorrelation",
    "decoupled_divergence",
    "deep_supervision_loss",
    "effective_share",
    "embedding_distance",
    "fused_linear_cross_entropy",
    "fused_linear_kd",
    "fused_linear_kd_items",
    "head_tier",
    "head_width",
    "hierarchical_pairs",
    "info_nce",
    "inter_class_distance",
    "intra_class_distance",
    "is_unbuilt",
    "jensen_shannon_divergence",
    "kl_divergence",
    "layerwise_kd",
    "lipschitz_penalty",
    "mean_kl_divergence",
    "mixup",
    "non_target_divergence",
    "pair_similarity",
    "per_item",
    "permute_other_classes",
    "reduce_items",
    "refined_cross_entropy",
    "resize",
    "sampled_kd",
    "similarity_matching",
    "skewed_kl_divergence",
    "soft_cross_entropy",
    "softened_log_softmax",
    "sparse_kd",
    "sparse_kd_items",
    "sparse_thresholds",
    "standardize_logits",
    "target_divergence",
    "teacher_outputs",
    "temporal_kd",
    "top_k_log_probs",
    "topk_kl",
    "universal_logit_distance",
]
