"""What a run of a comparison needs of the Trainer: a checkpoint to continue from, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_distill.modules.random_state import random_state, set_random_state

Clock = tuple[float, float]
REPORT_EVERY = 0.2  # seconds


class LastCheckpoint(Checkpoint):
    """Save a checkpoint after every epoch from which the run continues as if it had never stopped.

    Besides what Lightning saves it holds the state of the random number generators (of one process), so that order
    of the data, dropout and augmentation after the resume are those of an uninterrupted run; the validation metrics
    of the epochs before; and the time they took.

    Args:
        path: The file; overwritten by every epoch.

    Attributes:
        history: One mapping per validation: ``epoch``, ``step`` and the metrics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.history: list[dict[str, Any]] = []
        self._times_before: Clock = (0.0, 0.0)
        self._started: Clock = clock()
        self._stopped: Clock | None = self._started
        self._random_state: dict[str, Any] | None = None

    @property
    def times(self) -> Clock:
        """Wall-clock and CPU seconds of the training, of all the attempts that the run consists of."""
        now = self._stopped or clock()
        wall, cpu = self._times_before
        return wall + now[0] - self._started[0], cpu + now[1] - self._started[1]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put back the random state; Lightning has restored the callbacks, and made no data iterator yet."""
        if self._random_state is not None:
            set_random_state(self._random_state)
            for row in self.history:  # a new W&B run starts with the curve of the attempts before
                metrics = {key: value for key, value in row.items() if key != "step"}
                if trainer.logger is not None:
                    trainer.logger.log_metrics(metrics, step=row["step"])
        self._started, self._stopped = clock(), None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the metrics of this validation."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        self.history.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **metrics})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save."""
        trainer.save_checkpoint(self.path)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stopped = clock()

    def state_dict(self) -> dict[str, Any]:
        """Random state, history and times."""
        return {"random_state": random_state(), "history": list(self.history), "times": list(self.times)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what :meth:`on_fit_start` restores."""
        self._random_state = state_dict["random_state"]
        self.history = list(state_dict["history"])
        self._times_before = tuple(state_dict["times"])


class ReportFraction(L.Callback):
    """Call ``report`` now and then with the fraction of the training that is done.

    Args:
        report: Takes a number in [0, 1].
    """

    def __init__(self, report: Callable[[float], None]) -> None:
        self.report = report
        self._steps = float("inf")
        self._reported = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask for the number of steps once; the answer walks the data loaders."""
        self._steps = float(trainer.estimated_stepping_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report, if the last time is long enough ago."""
        now = time.monotonic()
        if now - self._reported >= REPORT_EVERY:
            self._reported = now
            self.report(min(trainer.global_step / self._steps, 1.0))


def clock() -> Clock:
    """Wall-clock and CPU seconds of this process since some moment."""
    return time.perf_counter(), time.process_time()
