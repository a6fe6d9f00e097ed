"""Whatever a student can learn from."""

from lightning_distill.teachers.adapter import AdapterOffTeacher
from lightning_distill.teachers.adapter_ema import AdapterEMATeacher
from lightning_distill.teachers.build import TeacherLike, build_teacher, load_network
from lightning_distill.teachers.cache import data_fingerprint, fingerprint, teacher_fingerprint
from lightning_distill.teachers.cached import CachedTeacher
from lightning_distill.teachers.ema import EMATeacher, momentum_alpha, scale_momentum
from lightning_distill.teachers.ensemble import (
    EnsembleTeacher,
    complexity_weights,
    ensemble_log_probs,
    ensemble_shares,
    learn_weights,
    performance_weights,
)
from lightning_distill.teachers.follow import FollowedTeacher
from lightning_distill.teachers.frozen import FrozenTeacher, FunctionTeacher
from lightning_distill.teachers.other_tokenizer import OtherTokenizerTeacher
from lightning_distill.teachers.past import MeanPrediction, PastTeacher
from lightning_distill.teachers.pools import (
    AverageChoice,
    CachedChoice,
    CascadeChoice,
    Choice,
    CostAwareChoice,
    DifficultyChoice,
    PoolMember,
    RouterLoss,
    ScoredChoice,
    TeacherPool,
    TeacherRouter,
)
from lightning_distill.teachers.previous import PreviousPredictions
from lightning_distill.teachers.prompts import PromptEnsemble, prepend_tokens, prompt_ensemble
from lightning_distill.teachers.quantized import quantized_ensemble
from lightning_distill.teachers.teacher import Teacher
from lightning_distill.teachers.whole_network import WholeNetworkTeacher

__all__ = [
    "AdapterEMATeacher",
    "AdapterOffTeacher",
    "AverageChoice",
    "CachedChoice",
    "CachedTeacher",
    "CascadeChoice",
    "Choice",
    "CostAwareChoice",
    "DifficultyChoice",
    "EMATeacher",
    "EnsembleTeacher",
    "FollowedTeacher",
    "FrozenTeacher",
    "FunctionTeacher",
    "MeanPrediction",
    "OtherTokenizerTeacher",
    "PastTeacher",
    "PoolMember",
    "PreviousPredictions",
    "PromptEnsemble",
    "RouterLoss",
    "ScoredChoice",
    "Teacher",
    "TeacherLike",
    "TeacherPool",
    "TeacherRouter",
    "WholeNetworkTeacher",
    "build_teacher",
    "complexity_weights",
    "data_fingerprint",
    "ensemble_log_probs",
    "ensemble_shares",
    "fingerprint",
    "learn_weights",
    "load_network",
    "momentum_alpha",
    "performance_weights",
    "prepend_tokens",
    "prompt_ensemble",
    "quantized_ensemble",
    "scale_momentum",
    "teacher_fingerprint",
]
