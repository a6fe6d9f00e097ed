"""Weigh auxiliary heads by how well they do."""

from __future__ import annotations

from typing import Any

import lightning as L

from lightning_distill.losses.auxiliary_heads import AuxiliaryHeads
from lightning_distill.weighting.auxiliary import performance_weights


class PerformanceHeadWeights(L.Callback):
    """After each validation, multiply the heads' first weights by ``main / head`` accuracy, or the inverse.

    See :func:`~lightning_distill.weighting.performance_weights`. The accuracies are those of the validation set, the
    same on all processes: choosing weights by them uses up a little of what the set can tell afterwards. Until the
    first validation the weights stay as they are. They are kept in checkpoints.

    Args:
        invert: Whether weak heads get less weight instead of more.
        max_ratio: Largest factor, and inverse of the smallest; at least 1.
        metric: Name of the metric in [0, 1]; the module logs it as ``val/<metric>`` and ``val/<tap>/<metric>``.

    Raises:
        ValueError: If ``max_ratio`` is below 1; at the start of a training without validation.
        TypeError: At the start of the training, if the module has no heads.
    """

    def __init__(self, invert: bool = False, max_ratio: float = 5.0, metric: str = "accuracy") -> None:
        performance_weights(1.0, [], max_ratio=max_ratio)  # checks the value
        self.invert = invert
        self.max_ratio = max_ratio
        self.metric = metric
        self._first: list[float] | None = None
        self._present: list[float] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there are heads and a validation set; take up the weights of a resumed run."""
        heads = getattr(pl_module, "heads", None)
        if not isinstance(heads, AuxiliaryHeads):
            raise TypeError(
                f"{type(self).__name__} weighs auxiliary heads, which {type(pl_module).__name__} does not have. Use "
                "DeepSupervision, or remove the callback."
            )
        if not trainer.enable_validation:
            raise ValueError(
                f"{type(self).__name__} reads validation accuracies, but there is no validation. Pass a validation "
                "set, or use a schedule: `AuxiliaryHeads(..., schedule=LinearDecay())`."
            )
        if self._first is None:
            self._first = list(heads.weights)
        if self._present is not None:
            heads.weights = list(self._present)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the weights for the steps to come."""
        if trainer.sanity_checking or self._first is None:
            return
        heads: Any = pl_module.heads
        found = trainer.callback_metrics
        names = [f"val/{self.metric}", *(f"val/{tap}/{self.metric}" for tap in heads.taps)]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"The validation logged no {missing}; there are {sorted(found)}. Change `metric`.")
        main, *of_heads = (float(found[name]) for name in names)
        factors = performance_weights(main, of_heads, invert=self.invert, max_ratio=self.max_ratio)
        self._present = [weight * factor for weight, factor in zip(self._first, factors, strict=True)]
        heads.weights = list(self._present)

    def state_dict(self) -> dict[str, Any]:
        """First and present weights."""
        return {"first": self._first, "present": self._present}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the weights of the run that is resumed."""
        self._first, self._present = state_dict["first"], state_dict["present"]
