"""Stop when another generation no longer helps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning as L

from lightning_distill.modules.born_again import BornAgain


def best_generation(
    values: Sequence[float],
    *,
    patience: int = 1,
    min_delta: float = 0.0,
    max_generations: int | None = None,
    mode: Literal["max", "min"] = "min",
) -> tuple[int, bool]:
    """The best generation so far, and whether it is time to stop.

    Args:
        values: What each generation reached, the first one first; at least one.
        patience: Stop after so many generations without a new best, at least 1.
        min_delta: A new best must be better by more than this.
        max_generations: Stop after so many in any case.
        mode: Whether less (``"min"``, of errors) or more is better.

    Example:
        >>> best_generation([0.30, 0.27, 0.26])
        (2, False)
        >>> best_generation([0.30, 0.27, 0.26, 0.262])
        (2, True)
    """
    sign = 1 if mode == "max" else -1
    best = 0
    for generation, value in enumerate(values):  # NaN: nobody knows
        if sign * (value - values[best]) > min_delta or (math.isnan(values[best]) and not math.isnan(value)):
            best = generation
    late = len(values) - 1 - best >= patience
    return best, late or (max_generations is not None and len(values) >= max_generations)


class GenerationEarlyStopping(L.Callback):
    """End the training of a :class:`~lightning_distill.BornAgain` after a generation that is no better than the best.

    ``BornAgain(..., monitor=...)`` and ``export(which="best")`` then give the weights of the best one: the student is
    the one that was tried last.

    Args:
        monitor: Name of a validation metric; its last value in a generation counts.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        patience: Generations without a new best after which it stops, at least 1.
        min_delta: A new best must be better by more than this; not negative.
        max_generations: Stop after so many in any case, at least 1. Default: as many as the module has.

    Raises:
        ValueError: If an argument is outside its range; at the end of a generation if there is no such metric.
        TypeError: At the start of the training, if the module is no ``BornAgain``.

    Attributes:
        values: What each generation reached; NaN where a resume has left the last validation out.
        best: The best generation, counted from 0.
    """

    def __init__(
        self,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        patience: int = 1,
        min_delta: float = 0.0,
        max_generations: int | None = None,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"`mode` must be 'max' or 'min', got {mode!r}.")
        for name, value in {"patience": patience, "max_generations": max_generations}.items():
            if value is not None and not value >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not min_delta >= 0:
            raise ValueError(f"`min_delta` must not be negative, got {min_delta}.")
        self.monitor = monitor
        self.mode: Literal["max", "min"] = mode
        self.patience = patience
        self.min_delta = min_delta
        self.max_generations = max_generations
        self.values: list[float] = []
        self.best = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that there are generations."""
        if stage == "fit":
            if not isinstance(pl_module, BornAgain):
                raise TypeError(f"GenerationEarlyStopping needs a BornAgain module, got {type(pl_module).__name__}.")
            self.values, self.best = [], 0

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """At the end of a generation, see whether it is the last."""
        assert isinstance(pl_module, BornAgain)
        if not pl_module.generation_ends:
            return
        name = f"{self.monitor}/generation_{pl_module.generation}"
        if name not in trainer.callback_metrics:
            known = [key for key in trainer.callback_metrics if key.startswith("val/") and "/generation_" not in key]
            raise ValueError(
                f"`monitor` is {self.monitor!r}, but generation {pl_module.generation} has no such metric; there are: "
                f"{', '.join(known) or '(none: no validation)'}."
            )
        # A generation is missing where Lightning has resumed from its last step, and left its last validation out.
        self.values += [math.nan] * (pl_module.generation - len(self.values))
        self.values.append(float(trainer.callback_metrics[name]))
        self.best, stop = best_generation(
            self.values,
            patience=self.patience,
            min_delta=self.min_delta,
            max_generations=self.max_generations,
            mode=self.mode,
        )
        if stop:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What the generations reached."""
        return {"values": list(self.values), "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on."""
        self.values, self.best = list(state_dict["values"]), state_dict["best"]
