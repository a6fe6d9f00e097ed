"""How far the student's attention is from the teacher's."""

from lightning_distill.losses.attention.heads import align_heads, assign_heads, head_costs
from lightning_distill.losses.attention.local_global import LocalGlobal, LocalGlobalParts, local_global_parts
from lightning_distill.losses.attention.matching import AttentionMatching, HeadAlignment
from lightning_distill.losses.attention.rows import (
    ROW_DISTANCES,
    SparseAttention,
    attention_js,
    attention_kl,
    attention_mse,
    attention_reverse_kl,
    attention_wasserstein,
    smooth_attention,
    sparse_attention,
    sparse_thresholds,
    visible_keys,
)
from lightning_distill.losses.attention.self_distillation import AttentionSelfDistillation, nearest_head_divergence

__all__ = [
    "ROW_DISTANCES",
    "AttentionMatching",
    "AttentionSelfDistillation",
    "HeadAlignment",
    "LocalGlobal",
    "LocalGlobalParts",
    "SparseAttention",
    "align_heads",
    "assign_heads",
    "attention_js",
    "attention_kl",
    "attention_mse",
    "attention_reverse_kl",
    "attention_wasserstein",
    "head_costs",
    "local_global_parts",
    "nearest_head_divergence",
    "smooth_attention",
    "sparse_attention",
    "sparse_thresholds",
    "visible_keys",
]
