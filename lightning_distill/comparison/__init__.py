"""Compare methods with a control group: the same seeds for all, paired statistics, a table, plots and one W&B group."""

from lightning_distill.comparison.comparison import Comparison
from lightning_distill.comparison.files import student_path
from lightning_distill.comparison.main import compare
from lightning_distill.comparison.runs import Experiment, Method
from lightning_distill.comparison.statistics import MethodSummary, PairedGain, holm, paired_gain

__all__ = [
    "Comparison",
    "Experiment",
    "Method",
    "MethodSummary",
    "PairedGain",
    "compare",
    "holm",
    "paired_gain",
    "student_path",
]
