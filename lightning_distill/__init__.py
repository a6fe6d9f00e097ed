"""Knowledge distillation for PyTorch Lightning.

Public names are imported when they are first used: ``import lightning_distill`` alone costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_distill.comparison import Comparison, Experiment, compare
    from lightning_distill.modules import (
        KD,
        BornAgain,
        DeepSupervision,
        DistillationModule,
        FeatureKD,
        ProgressiveStage,
        QADModule,
        StochasticDepthSelfKD,
    )
    from lightning_distill.outputs import Outputs, Step
    from lightning_distill.pipeline import Pipeline, Stage
    from lightning_distill.tasks import CausalLM, Classification, Regression, SequenceClassification, Task

__version__ = "0.1.0.dev0"

_ROOMS = {
    "lightning_distill.comparison": ("Comparison", "Experiment", "compare"),
    "lightning_distill.modules": (
        "KD",
        "BornAgain",
        "DeepSupervision",
        "DistillationModule",
        "FeatureKD",
        "ProgressiveStage",
        "QADModule",
        "StochasticDepthSelfKD",
    ),
    "lightning_distill.pipeline": ("Pipeline", "Stage"),
    "lightning_distill.outputs": ("Outputs", "Step"),
    "lightning_distill.tasks": ("CausalLM", "Classification", "Regression", "SequenceClassification", "Task"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "KD",
    "BornAgain",
    "CausalLM",
    "Classification",
    "Comparison",
    "DeepSupervision",
    "DistillationModule",
    "Experiment",
    "FeatureKD",
    "Outputs",
    "Pipeline",
    "ProgressiveStage",
    "QADModule",
    "Regression",
    "SequenceClassification",
    "Stage",
    "Step",
    "StochasticDepthSelfKD",
    "Task",
    "compare",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
