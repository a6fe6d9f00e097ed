"""The techniques as LightningModules."""

from lightning_distill.modules.base import DistillationModule
from lightning_distill.modules.born_again import BornAgain, Generation
from lightning_distill.modules.deep_supervision import DeepSupervision
from lightning_distill.modules.feature_kd import FeatureKD
from lightning_distill.modules.kd import KD
from lightning_distill.modules.progressive import ProgressiveStage
from lightning_distill.modules.qad import QADModule
from lightning_distill.modules.reinitialize import reset_parameters
from lightning_distill.modules.stochastic_depth import StochasticDepthSelfKD
from lightning_distill.modules.teacher_prediction import TeacherPrediction

__all__ = [
    "KD",
    "BornAgain",
    "DeepSupervision",
    "DistillationModule",
    "FeatureKD",
    "Generation",
    "ProgressiveStage",
    "QADModule",
    "StochasticDepthSelfKD",
    "TeacherPrediction",
    "reset_parameters",
]
