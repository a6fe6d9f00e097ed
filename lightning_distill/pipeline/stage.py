"""One stage of a pipeline, and what describes it."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_distill.comparison import Experiment
from lightning_distill.stages import Earlier


@dataclass(frozen=True)
class Stage:
    """A training of a pipeline.

    Args:
        name: Of the stage and of its folder.
        build: Makes the module, the data and the Trainer's arguments of the stage from the stages before it; called
            after ``seed_everything``, and again when the pipeline is resumed. The module is one of this library's (or
            has an ``export()`` of its own). Callbacks must be new in every call.
        monitor: Validation metric by which the best checkpoint is chosen.
        mode: Whether more (``"max"``) or less (``"min"``) of it is better.
        save_every_n_steps: Save in the middle of an epoch too; by default after each epoch and validation.
        configuration: What describes the stage, as JSON. A finished or half-finished stage is not continued with
            another one. By default what can be read off the experiment: classes, numbers, texts, shapes of weights, the
            arguments of ``functools.partial``. A number inside of a ``lambda`` cannot be seen.

    Raises:
        TypeError: If ``build`` cannot be called.
        ValueError: If ``mode`` is unknown.

    Example:
        >>> Stage("assistant", lambda earlier: Experiment(module, data, {"max_epochs": 5})).monitor
        'val/accuracy'
    """

    name: str
    build: Callable[[Earlier], Experiment]
    monitor: str = "val/accuracy"
    mode: Literal["max", "min"] = "max"
    save_every_n_steps: int | None = None
    configuration: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not callable(self.build):
            raise TypeError(
                f"`build` of the stage {self.name!r} must be a function of the earlier stages that returns an "
                f"`Experiment`, got {type(self.build).__name__}."
            )
        if self.mode not in ("max", "min"):
            raise ValueError(f"`mode` of the stage {self.name!r} must be 'max' or 'min', got {self.mode!r}.")


def describe(experiment: Experiment) -> dict[str, Any]:
    """What can be told of an experiment by looking at it, as JSON: a change of any of it makes another stage."""
    module: Any = experiment.module
    described: dict[str, Any] = {"module": {"class": _name(module), **_plain(dict(module.hparams))}}
    weights = {name: list(parameter.shape) for name, parameter in module.named_parameters()}
    described["weights"] = {
        "number": sum(parameter.numel() for parameter in module.parameters()),
        "shapes": hashlib.sha256(repr(sorted(weights.items())).encode()).hexdigest()[:16],
    }
    described["terms"] = {name: _plain(term) for name, term in getattr(module, "terms", {}).items()}
    described |= {
        name: _plain(getattr(module, name)) for name in ("weighting", "temperature", "task") if hasattr(module, name)
    }
    for name in ("optimizer_factory", "scheduler_factory"):
        if isinstance(factory := getattr(module, name, None), functools.partial):
            described[name] = _plain(factory)
    if experiment.datamodule is not None:
        data: Any = experiment.datamodule
        described["data"] = {"class": _name(data), **_public(data), **_plain(dict(data.hparams))}
    described["trainer"] = _plain(dict(experiment.trainer))
    return described


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain(value: Any) -> Any:
    """``value`` as JSON; objects by their class and those of their public attributes that are plain."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, functools.partial):
        return {"function": _plain(value.func), "args": _plain(value.args), **_plain(value.keywords)}
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    public = _public(value)
    return {"class": _name(value), **public} if public else _name(value)


def _public(value: object) -> dict[str, Any]:
    """Public attributes that are plain."""
    return {
        name: _plain(item)
        for name, item in getattr(value, "__dict__", {}).items()
        if not name.startswith("_") and name != "training" and _is_plain(item)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str))
