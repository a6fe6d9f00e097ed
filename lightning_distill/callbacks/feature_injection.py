"""Lend a quantized student some of its teacher's features, less and less."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import nn

from lightning_distill.recovery import FeatureInjector
from lightning_distill.teachers import FrozenTeacher


class FeatureInjection(L.Callback):
    r"""In training, move the outputs of chosen layers towards the teacher's: :math:`h + \alpha_t (h_T - h)`.

    Later layers then learn on good features while the earlier ones are still bad. The share falls linearly from
    ``alpha`` to 0 within ``num_steps``, after which the student is alone: the teacher is not there at inference. In
    validation nothing is injected. A function of the optimizer step, so it continues after a resume; the length of the
    schedule is kept in the checkpoint. Logs ``feature_injection``, the present share.

    Features must have the same shape: take the student's full-precision original as teacher. The student
    may learn to rely on what it is lent: then its own features die, and nothing is left when the teacher leaves. Look
    at it after ``num_steps``; a small ``alpha``, and a term that draws its features to the teacher's
    (:class:`~lightning_distill.losses.FeatureMatching`), make that rarer.

    Args:
        layers: Names of submodules whose outputs are tensors: a list, if they are called alike in both networks, or the
            student's to the teacher's.
        alpha: Share of the teacher's features at the beginning, in (0, 1].
        num_steps: After how many optimizer steps it is 0; default: half of the training.
        adaptive: Multiply each sample's share by how far its features are off; see
            :func:`~lightning_distill.recovery.adaptive_alpha`.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training, if a network has no such layer,
            or the length of the training is unknown; in the training, if features have different shapes.
        TypeError: At the start of the training, if the teacher is no network.
    """

    def __init__(
        self,
        layers: Sequence[str] | Mapping[str, str],
        alpha: float = 0.5,
        num_steps: int | None = None,
        *,
        adaptive: bool = False,
    ) -> None:
        if isinstance(layers, str) or not layers:
            raise ValueError(f"`layers` must be one or more names of submodules, got {layers!r}.")
        if not 0 < alpha <= 1:
            raise ValueError(f"`alpha`, the teacher's share, must be in (0, 1], got {alpha}.")
        if num_steps is not None and not num_steps >= 1:
            raise ValueError(f"`num_steps` must be positive, got {num_steps}.")
        self.layers = dict(layers) if isinstance(layers, Mapping) else {name: name for name in layers}
        self.alpha = alpha
        self.num_steps = num_steps
        self.adaptive = adaptive
        self._injector: FeatureInjector | None = None

    def alpha_at(self, step: int) -> float:
        """The teacher's share in an optimizer step; ``num_steps`` must be known."""
        assert self.num_steps is not None
        return self.alpha * max(1 - step / self.num_steps, 0.0)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hook both networks."""
        teacher = getattr(pl_module, "teacher", None)
        student = getattr(pl_module, "student", None)
        if not isinstance(teacher, FrozenTeacher) or not isinstance(student, nn.Module):
            raise TypeError(
                "FeatureInjection needs a module with a student and a teacher that is a network (`FrozenTeacher`), got "
                f"{type(pl_module).__name__} with the teacher {type(teacher).__name__}."
            )
        self._injector = FeatureInjector(student, teacher.network, self.layers, adaptive=self.adaptive)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the length of the training."""
        if self.num_steps is None:
            total = trainer.estimated_stepping_batches
            if not 0 < total < math.inf:
                raise ValueError(
                    "`num_steps` of FeatureInjection must be given: the length of this training is unknown (no "
                    "`max_steps`, `max_epochs`, or a data loader without a length)."
                )
            self.num_steps = max(int(total) // 2, 1)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Inject this step's share."""
        assert self._injector is not None
        self._injector.alpha = self.alpha_at(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave validation alone; log the share when the Trainer's log is due."""
        assert self._injector is not None
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set, but not declared, by Trainer
        if trainer.global_step % max(every, 1) == 0:
            pl_module.log("feature_injection", self._injector.alpha, batch_size=1)
        self._injector.alpha = 0.0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the hooks out."""
        self._remove()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the hooks out."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The length of the schedule."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the schedule that was begun, unless another was asked for."""
        self.num_steps = self.num_steps or state_dict["num_steps"]

    def _remove(self) -> None:
        if self._injector is not None:
            self._injector.remove()
            self._injector = None
