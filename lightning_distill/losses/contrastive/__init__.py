"""Contrastive distillation: a student's features should be nearest to the teacher's of the same sample."""

from lightning_distill.losses.contrastive.in_batch import InfoNCE
from lightning_distill.losses.contrastive.info_nce import info_nce
from lightning_distill.losses.contrastive.matching import ContrastiveMatching
from lightning_distill.losses.contrastive.perturbation import PerturbationInfoNCE, perturbed
from lightning_distill.losses.contrastive.similarity import BilinearSimilarity, cosine_similarity
from lightning_distill.losses.contrastive.temporal import TemporalInfoNCE, temporal_exclusions

__all__ = [
    "BilinearSimilarity",
    "ContrastiveMatching",
    "InfoNCE",
    "PerturbationInfoNCE",
    "TemporalInfoNCE",
    "cosine_similarity",
    "info_nce",
    "perturbed",
    "temporal_exclusions",
]
