"""A look at the first batch."""

from __future__ import annotations

from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import Task


def check_first_batch(step: Step, task: Task) -> None:
    """Look at the first batch for what would otherwise go wrong silently, or far from its cause."""
    task.check(step.student, step.labels)
    for who, outputs in (("student", step.student), ("teacher", step.teacher)):
        if outputs is not None and outputs.has_logits and not outputs.logits.isfinite().all():
            raise ValueError(_non_finite(who, outputs))


def _non_finite(who: str, outputs: Outputs) -> str:
    bad = int((~outputs.logits.isfinite()).sum())
    return (
        f"The {who}'s logits are not finite for the first batch: {bad} of {outputs.logits.numel()} are NaN or "
        f"infinite. Look at the {who}'s weights, its precision (fp16 overflows at 65504) and the inputs' scale."
    )
