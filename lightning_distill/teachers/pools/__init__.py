"""Several teachers, of which each sample gets those that suit it."""

from lightning_distill.teachers.pools.capability import StudentCapability, adaptive_threshold, teacher_weight
from lightning_distill.teachers.pools.choices import (
    AverageChoice,
    CascadeChoice,
    Choice,
    CostAwareChoice,
    DifficultyChoice,
    ScoredChoice,
)
from lightning_distill.teachers.pools.decisions import CachedChoice
from lightning_distill.teachers.pools.panel import Panel, PoolOutputs, take_rows
from lightning_distill.teachers.pools.pool import PoolMember, TeacherPool
from lightning_distill.teachers.pools.router import RouterLoss, TeacherRouter, load_balance, mixture_nll, route
from lightning_distill.teachers.pools.scores import (
    confidence_difficulty,
    cost_aware_scores,
    teacher_scores,
    vote_disagreement,
)
from lightning_distill.teachers.pools.selection import (
    EarlyStop,
    bucket_by_difficulty,
    evaluate_until,
    explore,
    hard_select,
    sample_teacher,
    select_by_difficulty,
    soft_select,
)

__all__ = [
    "AverageChoice",
    "CachedChoice",
    "CascadeChoice",
    "Choice",
    "CostAwareChoice",
    "DifficultyChoice",
    "EarlyStop",
    "Panel",
    "PoolMember",
    "PoolOutputs",
    "RouterLoss",
    "ScoredChoice",
    "StudentCapability",
    "TeacherPool",
    "TeacherRouter",
    "adaptive_threshold",
    "bucket_by_difficulty",
    "confidence_difficulty",
    "cost_aware_scores",
    "evaluate_until",
    "explore",
    "hard_select",
    "load_balance",
    "mixture_nll",
    "route",
    "sample_teacher",
    "select_by_difficulty",
    "soft_select",
    "take_rows",
    "teacher_scores",
    "teacher_weight",
    "vote_disagreement",
]
