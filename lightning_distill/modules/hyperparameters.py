"""What of a module's arguments goes into its checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import lightning as L
from lightning.pytorch.core.mixins.hparams_mixin import HyperparametersMixin
from lightning.pytorch.utilities.parsing import collect_init_args

_from_configuration: ContextVar[bool] = ContextVar("from_configuration", default=False)


@contextmanager
def built_from_configuration() -> Iterator[None]:
    """Within this context modules are built by a command line, which hands over a complete, plain configuration."""
    token = _from_configuration.set(True)
    try:
        yield
    finally:
        _from_configuration.reset(token)


def save_plain_hyperparameters(module: L.LightningModule) -> None:
    """Save the arguments of the module's ``__init__`` (and its subclasses') that are plain values.

    Networks, terms and functions would be copied, pickled and drag the teacher into every checkpoint; they are left
    out, and given again to ``load_from_checkpoint``. A module that was built from YAML has none: its arguments are
    class paths and numbers, all are saved, and its checkpoint can rebuild student and teacher alike.

    Call it in ``__init__`` right after ``super().__init__()``.
    """
    current = inspect.currentframe()
    frame = current.f_back if current is not None else None
    assert frame is not None
    if _from_configuration.get():
        module.save_hyperparameters(frame=frame)
        return
    arguments: dict[str, Any] = {}
    for level in collect_init_args(frame, [], classes=(HyperparametersMixin,)):
        arguments.update(level)
    module.save_hyperparameters(ignore=[name for name, value in arguments.items() if not _plain(value)], frame=frame)


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
