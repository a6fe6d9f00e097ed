"""Callbacks around a pool of teachers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_distill.teachers.pools.capability import StudentCapability, adaptive_threshold
from lightning_distill.teachers.pools.choices import Choice, DifficultyChoice
from lightning_distill.teachers.pools.decisions import CachedChoice
from lightning_distill.teachers.pools.pool import TeacherPool


class PoolLog(L.Callback):
    """Log what the pool did since the last entry, every ``log_every_n_steps`` of the Trainer, over all processes.

    ``pool/share/<name>`` is the mean share of a teacher in a training sample; ``pool/runs/<name>`` the fraction of
    samples that it was run on; ``pool/cost`` the mean cost of a sample, of the teachers' runs.

    Raises:
        TypeError: At the start, if the module's teacher is no :class:`~lightning_distill.teachers.TeacherPool`.
    """

    def __init__(self) -> None:
        self._last = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count."""
        pool_of(pl_module).usage()
        self._last = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when the Trainer's log is due."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set, but not declared, by Trainer
        step = trainer.global_step
        if step % max(every, 1) != 0 or step == self._last:
            return
        self._last = step
        pool = pool_of(pl_module)
        shares, runs, samples = pool.usage()
        sums = torch.cat([shares, runs, shares.new_tensor([samples])])
        if trainer.world_size > 1:
            reduced = trainer.strategy.reduce(sums, reduce_op="sum")
            assert isinstance(reduced, torch.Tensor)
            sums = reduced
        values = sums.tolist()
        teachers, samples = len(pool.names), max(values[-1], 1)
        entry = {f"pool/share/{name}": values[place] / samples for place, name in enumerate(pool.names)}
        entry |= {f"pool/runs/{name}": values[teachers + place] / samples for place, name in enumerate(pool.names)}
        entry["pool/cost"] = sum(member.cost * entry[f"pool/runs/{member.name}"] for member in pool.members)
        pl_module.log_dict(entry, batch_size=1)


class AdaptToCapability(L.Callback):
    """Ask the dearest teacher for fewer samples as the student gets better: :func:`adaptive_threshold`.

    The student's rate of learning is the growth of ``monitor`` per epoch between two validations; its integral, the
    capability, begins with the first value. After each validation the last threshold of the pool's
    :class:`~lightning_distill.teachers.DifficultyChoice` becomes ``theta0 * (1 + alpha * capability)``, with its first
    value as ``theta0``. The state is in checkpoints.

    Args:
        monitor: A logged metric of which more is better, in [0, 1].
        alpha: Growth of the threshold per unit of capability, not negative.

    Raises:
        ValueError: If ``alpha`` is negative; at the start, if the pool's choice is no ``DifficultyChoice`` with
            thresholds, or remembers its decisions for ever; after a validation, if ``monitor`` was not logged.
        TypeError: At the start, if the teacher is no pool.
    """

    def __init__(self, monitor: str = "val/accuracy", alpha: float = 0.5) -> None:
        adaptive_threshold(0.0, theta0=0.0, alpha=alpha)  # checks the value
        self.monitor = monitor
        self.alpha = alpha
        self.capability: StudentCapability | None = None
        self.theta0: float | None = None
        self._last = (0.0, 0.0)  # time in epochs, value

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the first threshold; put the present one back after a resume."""
        choice = _difficulty_choice(pool_of(pl_module).choice)
        if self.theta0 is None:
            self.theta0 = choice.thresholds[-1]
        self._turn(choice)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take in what the student has learned, and move the threshold."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise ValueError(
                f"`monitor` is {self.monitor!r}, which was not logged; there are {sorted(trainer.callback_metrics)}."
            )
        # a metric that somebody logs without `sync_dist` differs between processes; their thresholds must not
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        now = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / max(trainer.num_training_batches, 1)
        if self.capability is None:
            self.capability = StudentCapability(value)
        elif now > self._last[0]:
            dt = now - self._last[0]
            self.capability.update((value - self._last[1]) / dt, dt)
        self._last = (now, value)
        self._turn(_difficulty_choice(pool_of(pl_module).choice))

    def state_dict(self) -> dict[str, Any]:
        """Capability, first threshold and last value."""
        known = None if self.capability is None else (self.capability.value, self.capability.rate)
        return {"capability": known, "theta0": self.theta0, "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put :meth:`state_dict` back."""
        known = state_dict["capability"]
        self.capability = None if known is None else StudentCapability(*known)
        self.theta0 = state_dict["theta0"]
        self._last = tuple(state_dict["last"])

    def _turn(self, choice: DifficultyChoice) -> None:
        if self.capability is None:
            return
        assert self.theta0 is not None
        theta = adaptive_threshold(self.capability.value, theta0=self.theta0, alpha=self.alpha)
        earlier = choice.thresholds[:-1]
        choice.thresholds = (*earlier, max(theta, *earlier, 0.0))


def pool_of(module: L.LightningModule) -> TeacherPool:
    """The module's pool of teachers.

    Raises:
        TypeError: If its teacher is none.
    """
    teacher = getattr(module, "teacher", None)
    if not isinstance(teacher, TeacherPool):
        raise TypeError(f"The callback needs a `TeacherPool` as the module's teacher, got {type(teacher).__name__}.")
    return teacher


def _difficulty_choice(choice: Choice) -> DifficultyChoice:
    inner = choice.choice if isinstance(choice, CachedChoice) and choice.max_uses is not None else choice
    if not isinstance(inner, DifficultyChoice) or not inner.thresholds:
        raise ValueError(
            "`AdaptToCapability` moves the last threshold of a `DifficultyChoice`, alone or in a `CachedChoice` with "
            f"`max_uses`, got {type(choice).__name__}."
        )
    return inner
