"""What may be varied, and in which range."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

KEYS = ("low", "high", "log", "step", "integer")
Label = float | int | str | bool | None


@dataclass(frozen=True)
class Parameter:
    """One setting: a range of numbers, or a list of choices.

    Attributes:
        name: Dotted path in the configuration, ``model.init_args.temperature``.
        low: Lower end of the range.
        high: Upper end, above ``low``.
        log: Whether ratios count rather than differences; then ``low`` is positive.
        step: Distance of neighbouring values from ``low`` on; any value by default. Not with ``log``.
        integer: Whether the values are whole numbers.
        choices: The values, in place of a range; anything that YAML can hold.

    Raises:
        ValueError: If the values do not make a range, or a list of different choices.
    """

    name: str
    low: float = math.nan
    high: float = math.nan
    log: bool = False
    step: float | None = None
    integer: bool = False
    choices: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        what = f"`space[{self.name!r}]`"
        if self.choices:
            if len(set(self.labels)) < len(self.choices):
                raise ValueError(f"{what} has the same choice twice: {list(self.choices)}.")
            return
        if not self.low < self.high or math.isinf(self.low) or math.isinf(self.high):
            raise ValueError(f"{what} must have `low` below `high`, got {self.low} and {self.high}.")
        if self.log and not self.low > 0:
            raise ValueError(f"{what} is on a logarithmic scale, so that `low` must be positive, got {self.low}.")
        if self.step is not None and (self.log or not self.step > 0):
            raise ValueError(f"{what} has the step {self.step}; it must be positive, and there is none with `log`.")
        whole = all(float(value).is_integer() for value in (self.low, self.high, self.step or 1))
        if self.integer and not whole:
            raise ValueError(f"{what} has integers, so that `low`, `high` and `step` must be, too.")

    @property
    def labels(self) -> tuple[Label, ...]:
        """The choices as the storage keeps them: scalars as they are, anything else as JSON."""
        return tuple(
            choice if choice is None or isinstance(choice, (bool, int, float, str)) else json.dumps(choice)
            for choice in self.choices
        )

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        if self.choices:
            return CategoricalDistribution(self.labels)
        if self.integer:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def value(self, label: Label) -> Any:
        """The value in the configuration for what Optuna suggests or the storage keeps."""
        return self.choices[self.labels.index(label)] if self.choices else label

    def examples(self) -> list[Any]:
        """The ends of the range, or all choices: where a configuration may turn out not to be valid."""
        ends = [int(self.low), int(self.high)] if self.integer else [float(self.low), float(self.high)]
        return list(self.choices) or ends

    def label_of(self, value: Any) -> Label:
        """What the storage keeps for ``value``.

        Raises:
            ValueError: If it is not among the choices or outside the range.
        """
        if self.choices:
            if value in self.choices:
                return self.labels[self.choices.index(value)]
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            steps = (value - self.low) / (self.step or (1 if self.integer and not self.log else math.inf))
            whole = float(value).is_integer() if self.integer else True
            if self.low <= value <= self.high and whole and math.isclose(steps, round(steps), abs_tol=1e-9):
                return value
        raise ValueError(f"{value!r} is not in `space[{self.name!r}]`.")


def read_space(space: Mapping[str, Any]) -> list[Parameter]:
    """The settings that a mapping of dotted paths to ranges or choices describes.

    Args:
        space: A range is ``{low: 1.0, high: 10.0}``, with ``log: true`` for ratios, ``step: 0.5``, ``integer: true``;
            choices are a list.

    Raises:
        ValueError: If it is empty, or an entry is neither.

    Example:
        >>> [p.name for p in read_space({"lr": {"low": 0.01, "high": 0.1, "log": True}, "depth": [1, 2]})]
        ['lr', 'depth']
    """
    if not space:
        raise ValueError(
            "`space` is empty; name what may be varied, as `model.init_args.temperature: {low: 1, high: 9}`."
        )
    return [_read(name, entry) for name, entry in space.items()]


def _read(name: str, entry: Any) -> Parameter:
    if isinstance(entry, Parameter):
        return entry
    if isinstance(entry, Sequence) and not isinstance(entry, str) and len(entry) > 0:
        return Parameter(name, choices=tuple(entry))
    if isinstance(entry, Mapping) and {"low", "high"} <= set(entry) <= set(KEYS):
        for key in ("low", "high", "step"):
            value = entry.get(key, 0.0)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(
                    f"`{key}` of `space[{name!r}]` must be a number, got {value!r} (YAML reads 1e-3 as a text; write "
                    "0.001 or 1.0e-3)."
                )
        return Parameter(name, **entry)
    raise ValueError(
        f"`space[{name!r}]` must be a list of choices, or a range with `low` and `high` (and perhaps `log`, `step`, "
        f"`integer`), got {entry!r}."
    )
