"""How far the student's features are from the teacher's: ``distance(student, teacher, mask=None)``.

Features have the channels last, ``(B, *positions, d)``; ``mask``, boolean ``(B, *positions)``, tells the positions that
count. A distance returns one value per position, one per sample, or a scalar for the batch, in float32 or wider.
"""

from lightning_distill.losses.distances.cka import CKA, linear_cka
from lightning_distill.losses.distances.distance import Distance
from lightning_distill.losses.distances.learned import CRD, VID, critic_loss, gaussian_nll
from lightning_distill.losses.distances.low_rank import LowRank, low_rank_distance, top_right_singular_vectors
from lightning_distill.losses.distances.maps import (
    HierarchicalContext,
    Spectrum,
    attention_transfer,
    spectral_distance,
)
from lightning_distill.losses.distances.mmd import MMD, mmd2, neuron_selectivity
from lightning_distill.losses.distances.pointwise import cosine, dual_norm, layer_norm, mse, normalized_mse
from lightning_distill.losses.distances.procrustes import (
    Alignment,
    Procrustes,
    metric_matching_transform,
    procrustes,
)
from lightning_distill.losses.distances.relations import (
    RKD,
    Correlation,
    angle_relation,
    distance_relation,
    feature_correlation,
    probabilistic_transfer,
    similarity_preserving,
)
from lightning_distill.losses.distances.sequences import (
    ContentPosition,
    PooledSequence,
    pool_sequence,
    split_content_position,
)

DISTANCES: dict[str, Distance] = {
    "attention_transfer": attention_transfer,
    "content_position": ContentPosition(),
    "correlation": Correlation(),
    "cosine": cosine,
    "crd": CRD(),
    "dual_norm": dual_norm,
    "hierarchical_context": HierarchicalContext(),
    "linear_cka": CKA(),
    "mmd": MMD(),
    "mse": mse,
    "neuron_selectivity": neuron_selectivity,
    "normalized_mse": normalized_mse,
    "probabilistic_transfer": probabilistic_transfer,
    "rkd": RKD(),
    "similarity_preserving": similarity_preserving,
    "spectrum": Spectrum(),
    "vid": VID(),
}
"""Distances by the names that terms know them by, with their default settings."""

__all__ = [
    "CKA",
    "CRD",
    "DISTANCES",
    "MMD",
    "RKD",
    "VID",
    "Alignment",
    "ContentPosition",
    "Correlation",
    "Distance",
    "HierarchicalContext",
    "LowRank",
    "PooledSequence",
    "Procrustes",
    "Spectrum",
    "angle_relation",
    "attention_transfer",
    "cosine",
    "critic_loss",
    "distance_relation",
    "dual_norm",
    "feature_correlation",
    "gaussian_nll",
    "layer_norm",
    "linear_cka",
    "low_rank_distance",
    "metric_matching_transform",
    "mmd2",
    "mse",
    "neuron_selectivity",
    "normalized_mse",
    "pool_sequence",
    "probabilistic_transfer",
    "procrustes",
    "similarity_preserving",
    "spectral_distance",
    "split_content_position",
    "top_right_singular_vectors",
]
