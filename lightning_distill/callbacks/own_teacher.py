"""What callbacks share that bring a teacher which is made of the student."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
from torch import nn

from lightning_distill.modules import DistillationModule
from lightning_distill.teachers.teacher import Teacher


def bring_teacher(
    callback: L.Callback,
    trainer: L.Trainer,
    module: L.LightningModule,
    make: Callable[[nn.Module], Teacher],
    kind: type[Teacher],
) -> None:
    """Give ``module`` the teacher that ``make`` makes of its student, unless it has one of that ``kind``.

    To be called in ``setup``: before the checkpoint is loaded and processes compare their weights.

    Raises:
        TypeError: If ``module`` is none of ours.
        ValueError: If it has another teacher, or a callback that copies the whole module comes before this one.
    """
    name = type(callback).__name__
    if not isinstance(module, DistillationModule):
        raise TypeError(
            f"{name} needs a module of lightning-distill, such as KD(student, alpha=0.5), got {type(module).__name__}."
        )
    if isinstance(module.teacher, kind):
        return
    if module.teacher is not None:
        raise ValueError(
            f"The module has a teacher already, a {type(module.teacher).__name__}; {name} brings its own. Pass "
            "`teacher=None`, or remove the callback."
        )
    _refuse_averaging_before(callback, trainer)
    with module.untapped() as student:
        teacher = make(student)
    teacher.tap(dict.fromkeys(tap for term in module.terms.values() for tap in taps_of(term)))
    module.teacher = teacher


def needing_teacher(module: DistillationModule) -> list[str]:
    """Names of the loss terms that compare the student with a teacher."""
    return [name for name, term in module.terms.items() if getattr(term, "needs_teacher", True)]


def taps_of(term: nn.Module) -> tuple[str, ...]:
    """What ``term`` reads of the teacher."""
    return tuple(getattr(term, "teacher_taps", ()))


def _refuse_averaging_before(callback: L.Callback, trainer: L.Trainer) -> None:
    averaging = getattr(L.pytorch.callbacks, "WeightAveraging", ())  # since Lightning 2.6
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, averaging):
            name = type(callback).__name__
            raise ValueError(
                f"{type(other).__name__} is listed before {name}: it has copied the module without its teacher, and "
                f"would mix up their weights. List {name} first: `callbacks=[{name}(...), "
                f"{type(other).__name__}(...)]`."
            )
