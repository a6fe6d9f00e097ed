"""Log what a selection of items took."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from torch import Tensor

from lightning_distill.selection import Selection


class LogSelection(L.Callback):
    """Log, at the end of every training epoch, what the module's selection rules chose in it.

    For each term with a :class:`~lightning_distill.selection.Selection` in ``item_weights`` (``all`` stands for
    ``"*"``): ``selection/<term>/fraction``, the share of items that was chosen, and, for labelled items,
    ``selection/<term>/balance``, how evenly they are spread over the classes (1: evenly, 0: all of one class). After
    ``trainer.fit`` the reports of the last epoch are in :attr:`reports`.

    Attributes:
        reports: :class:`~lightning_distill.selection.SelectionReport` by term name.

    Raises:
        TypeError: At the start of the training, if the module selects nothing.
    """

    def __init__(self) -> None:
        self.reports: dict[str, Any] = {}
        self._counts: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that there is something to report; give a resumed epoch its first half."""
        rules = selections(pl_module)
        if not rules:
            raise TypeError(
                f"LogSelection reports what the rules in `item_weights` select, but {type(pl_module).__name__} has "
                "none of them. Pass, for instance, `item_weights={'soft': SelectByRunningPercentile()}`."
            )
        for name, rule in rules.items():
            rule.counts = self._counts.get(name)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the counts so far, for a checkpoint in the middle of an epoch."""
        counts = {name: rule.counts for name, rule in selections(pl_module).items()}
        self._counts = {name: count for name, count in counts.items() if count is not None}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch's reports and begin anew."""
        for name, rule in selections(pl_module).items():
            report = rule.report()
            if report is None:
                continue
            self.reports[name] = report
            values = {"fraction": report.fraction, "balance": report.balance}
            pl_module.log_dict(
                {f"selection/{name}/{key}": value for key, value in values.items() if not math.isnan(value)},
                batch_size=1,
            )
            rule.reset()
        self._counts = {}

    def state_dict(self) -> dict[str, Any]:
        """The counts of the epoch that is not over."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what :meth:`on_fit_start` gives back."""
        self._counts = dict(state_dict["counts"])


def selections(pl_module: L.LightningModule) -> dict[str, Selection]:
    """The module's selection rules by term name; ``"*"`` is called ``all``."""
    rules = getattr(pl_module, "item_weights", {})
    return {"all" if name == "*" else name: rule for name, rule in rules.items() if isinstance(rule, Selection)}
