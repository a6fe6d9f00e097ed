"""The interface of a weighting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from lightning_distill.outputs import Step
from lightning_distill.weighting.live import Live


class Weighting(nn.Module):
    """Turns the losses of the terms into the one scalar that is minimised.

    State that must survive a resume (learned weights, running means) stands in parameters and buffers; parameters
    join the optimizer in a group without weight decay.

    Attributes:
        student_taps: Names of the student's activations that :meth:`look` reads from ``step.student.features``.
        learning_rate: Of the weighting's parameters; ``None`` for the optimizer's own.
    """

    student_taps: Iterable[str] = ()
    learning_rate: float | None = None

    def bind(self, terms: Sequence[str], student: nn.Module) -> None:
        """Learn the names of the module's terms, and whom they train. Called once, when the module gets the weighting.

        Raises:
            ValueError: If the weighting does not fit the terms.
        """

    def look(self, step: Step, live: Live) -> None:
        """Look at a training batch before its losses are combined; for weights that depend on this very step."""

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Combine scalars by term name into one scalar."""
        raise TypeError(f"{type(self).__name__} is a `Weighting` without a `forward(losses)`; define one.")

    def weights(self) -> Mapping[str, float | Tensor]:
        """The present weight of each term, for the log; tensors are detached."""
        raise TypeError(f"{type(self).__name__} is a `Weighting` without `weights()`; define it.")


def check_several(name: str, terms: Sequence[str]) -> None:
    """Refuse to balance fewer than two terms.

    Args:
        name: Of what balances, for the message.
        terms: The terms' names.

    Raises:
        ValueError: If there is one term only.
    """
    if len(terms) < 2:
        raise ValueError(
            f"{name} balances two terms or more, but the module has only {list(terms)}. Add a term; for a language "
            "model whose 'kd' computes labels and teacher together, name both: `weights={'hard': 0.5, 'soft': 0.5}`."
        )
