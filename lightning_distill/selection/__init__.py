"""Selective distillation: from which samples or tokens the student learns."""

from lightning_distill.selection.classes import OnlyClasses
from lightning_distill.selection.report import (
    SelectionReport,
    report_of_counts,
    selection_counts,
    selection_report,
)
from lightning_distill.selection.rules import (
    SelectByClass,
    SelectByEntropy,
    SelectByPercentile,
    SelectByRunningPercentile,
    SelectByVariance,
    Selection,
)
from lightning_distill.selection.uncertainty import (
    class_thresholds,
    dynamic_threshold,
    item_entropy,
    percentile_threshold,
)

__all__ = [
    "OnlyClasses",
    "SelectByClass",
    "SelectByEntropy",
    "SelectByPercentile",
    "SelectByRunningPercentile",
    "SelectByVariance",
    "Selection",
    "SelectionReport",
    "class_thresholds",
    "dynamic_threshold",
    "item_entropy",
    "percentile_threshold",
    "report_of_counts",
    "selection_counts",
    "selection_report",
]
