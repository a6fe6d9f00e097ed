"""What an epoch measures: of each data loader, and of each that says something."""

from __future__ import annotations

from torch import Tensor

from lightning_distill.evaluation import Evaluation
from lightning_distill.outputs import Outputs
from lightning_distill.tasks import Task


class Evaluations:
    """The measurements of one epoch.

    Args:
        task: What counts as right.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._found: dict[tuple[int, str], Evaluation] = {}

    def of(self, loader: int, outputs: Outputs, name: str = "") -> Evaluation:
        """Where batches of a data loader are added; ``name`` is that of outputs beside the student's."""
        if (loader, name) not in self._found:
            self._found[loader, name] = Evaluation(self._task, outputs)
        return self._found[loader, name]

    def values(self, stage: str) -> dict[str, Tensor]:
        """All values by what they are logged as, ``"val/accuracy"``."""
        values: dict[str, Tensor] = {}
        loaders = {loader for loader, _ in self._found}
        for (loader, outputs), evaluation in self._found.items():
            prefix = f"{stage}/{outputs}/" if outputs else f"{stage}/"
            suffix = f"/loader_{loader}" if len(loaders) > 1 else ""
            values |= {f"{prefix}{name}{suffix}": value for name, value in evaluation.compute().items()}
        return values

    def clear(self) -> None:
        """Begin the next epoch with none."""
        self._found = {}
