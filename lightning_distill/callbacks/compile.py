"""Student and teacher through the compiler of torch."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_distill.modules import DistillationModule


class Compile(L.Callback):
    """Compile the student, and the teacher's network, by ``torch.compile`` when the training starts.

    Rounding above all gains by it: what :class:`~lightning_distill.QADModule` adds to a layer is many passes over
    memory, which become one or two. Weights, names in checkpoints, taps and hooks stay as they are; only the calls go
    through the compiler. The first steps take as long as it compiles, seconds to minutes. It compiles anew for other
    shapes, and when something changes that it took for a constant: a
    :class:`~lightning_distill.callbacks.QuantizationRamp` of many steps is such.

    Args:
        backend: Of ``torch.compile``. ``"inductor"`` needs a C++ compiler, on a GPU Triton.
        mode: Of ``torch.compile``, such as ``"max-autotune"``.
        dynamic: Of ``torch.compile``: whether to compile for all shapes at once; by default when a second one comes.
        teacher: Whether to compile the teacher, where it is one network.

    Raises:
        ValueError: If there is no such backend.
        TypeError: At the start of the training, if the module is no :class:`~lightning_distill.DistillationModule`.
    """

    def __init__(
        self, backend: str = "inductor", mode: str | None = None, dynamic: bool | None = None, *, teacher: bool = True
    ) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise ValueError(f"`backend` must be one of {known}, got {backend!r}.")
        self.settings: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic}
        self.teacher = teacher

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compile; ranges of quantized layers are known by now."""
        if not isinstance(pl_module, DistillationModule):
            raise TypeError(
                "Compile compiles the student of a `DistillationModule` such as `KD`, but the module is a "
                f"{type(pl_module).__name__}. Call `module.compile()` instead."
            )
        pl_module.student.compile(**self.settings)
        network = getattr(pl_module.teacher, "network", None) if self.teacher else None
        if isinstance(network, nn.Module):
            network.compile(**self.settings)
