"""Checkpoints of a training that can be killed at any time, each with a hash that tells whether it is whole."""

from __future__ import annotations

import shutil
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lightning_distill.files import content_hash, read_json, write_json


@dataclass(frozen=True)
class Saved:
    """A checkpoint.

    Attributes:
        path: The file, or the folder of a spread one.
        sha256: Of its content.
        step: Optimizer steps at that time.
        value: The monitored metric, if it was measured then.
    """

    path: Path
    sha256: str
    step: int
    value: float | None

    @property
    def whole(self) -> bool:
        """Whether it is there and its content is what was written."""
        return self.path.exists() and content_hash(self.path) == self.sha256


class StageCheckpoint(Checkpoint):
    """Save after every epoch and validation, keep the best and the newest, and know which are whole.

    Beside each checkpoint lies a small file with the hash of its content, written last: a checkpoint without one, or
    with another content, is not used. So a kill in the middle of writing costs one checkpoint, and the one before takes
    its place. Nothing is overwritten.

    Args:
        folder: Where; made if it is not there.
        monitor: Validation metric by which the best is chosen.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        every_n_steps: Save in the middle of an epoch too, every so many optimizer steps; ``None`` for no.
        keep: How many of the newest stay beside the best, at least 2: the last may be damaged.

    Attributes:
        seconds: Time of the training so far, all attempts together.

    Raises:
        ValueError: If an argument is outside its range; in training, if a validation does not log ``monitor``.
    """

    def __init__(
        self,
        folder: str | Path,
        monitor: str = "val/accuracy",
        mode: Literal["max", "min"] = "max",
        every_n_steps: int | None = None,
        keep: int = 2,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"`mode` must be 'max' or 'min', got {mode!r}.")
        if every_n_steps is not None and not every_n_steps >= 1:
            raise ValueError(f"`every_n_steps` must be at least 1, got {every_n_steps}.")
        if not keep >= 2:
            raise ValueError(f"`keep` must be at least 2 (the newest may be damaged), got {keep}.")
        self.folder = Path(folder)
        self.monitor = monitor
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._value: float | None = None
        self._saved_step = -1
        self._seconds_before = 0.0
        self._started: float | None = None

    @property
    def seconds(self) -> float:
        """Time of the training so far, all attempts together."""
        return self._seconds_before + (0.0 if self._started is None else time.perf_counter() - self._started)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the metric; a validation in the middle of an epoch is followed by a checkpoint at once."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(
                f"`monitor` is {self.monitor!r}, but the validation logs {', '.join(sorted(metrics)) or 'nothing'}. "
                "Choose one of these."
            )
        self._value = float(metrics[self.monitor])
        if not trainer.is_last_batch:
            self._save(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in the middle of an epoch, if it is time."""
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if due and step != self._saved_step and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._seconds_before = state_dict["seconds"]

    def best(self) -> Saved | None:
        """The checkpoint with the best metric that is whole; the newest, if none has a metric."""
        return best_checkpoint(self.folder, self.mode)

    def _save(self, trainer: L.Trainer) -> None:
        value, self._value = self._value, None
        self._saved_step = step = trainer.global_step
        measured = "" if value is None else "-measured"
        path = self.folder / f"epoch{trainer.current_epoch:05d}-step{step:09d}{measured}.ckpt"
        trainer.save_checkpoint(path)  # by all processes together
        if not trainer.is_global_zero:
            return
        record = Saved(path, content_hash(path), step, value)
        write_json(_record_path(path), {**asdict(record), "path": path.name})
        self._remove_old()

    def _remove_old(self) -> None:
        records = checkpoints(self.folder)
        stay = {record.path for record in records[-self.keep :]}
        measured = [record for record in records if record.value is not None]
        if measured:
            stay.add(_best(measured, self.mode).path)
        for record in records:
            if record.path not in stay:
                _record_path(record.path).unlink(missing_ok=True)  # first: what has no record is not used
                if record.path.is_dir():
                    shutil.rmtree(record.path, ignore_errors=True)
                else:
                    record.path.unlink(missing_ok=True)


def checkpoints(folder: Path) -> list[Saved]:
    """All checkpoints with a record in ``folder``, oldest first; their contents are not looked at."""
    found = []
    for path in sorted(folder.glob("*.ckpt.json")):
        try:
            record = read_json(path)
            found.append(Saved(folder / record["path"], record["sha256"], record["step"], record["value"]))
        except (ValueError, KeyError, OSError):  # written by a machine that lost power
            continue
    return sorted(found, key=lambda saved: (saved.step, saved.value is not None))


def newest_checkpoint(folder: Path) -> Saved | None:
    """The newest checkpoint in ``folder`` that is whole; a warning names each damaged one."""
    return _first_whole(reversed(checkpoints(folder)))


def best_checkpoint(folder: Path, mode: str) -> Saved | None:
    """The whole checkpoint with the best metric; the newest, if none has one."""
    measured = [saved for saved in checkpoints(folder) if saved.value is not None]
    sign = -1 if mode == "max" else 1
    ranked = sorted(measured, key=lambda saved: (saved.value != saved.value, sign * (saved.value or 0.0), saved.step))
    return _first_whole(ranked) or newest_checkpoint(folder)


def _best(measured: list[Saved], mode: str) -> Saved:
    sign = -1 if mode == "max" else 1
    return min(measured, key=lambda saved: (saved.value != saved.value, sign * (saved.value or 0.0), saved.step))


def _first_whole(saved: Any) -> Saved | None:
    for one in saved:
        if one.whole:
            found: Saved = one
            return found
        warnings.warn(
            f"The checkpoint {one.path} is damaged or gone: its content is not what its record says. The one before it "
            "is used.",
            stacklevel=3,
        )
    return None


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


__all__ = ["Saved", "StageCheckpoint", "best_checkpoint", "checkpoints", "newest_checkpoint"]
