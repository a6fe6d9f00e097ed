"""The arguments that all modules have: their types, defaults and checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_distill.losses.term import Term
from lightning_distill.outputs import StepRule
from lightning_distill.tasks import Classification, Task
from lightning_distill.weighting import FixedWeights, Weighting

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler | ReduceLROnPlateau]
Temperature = float | StepRule
ItemWeights = Mapping[str, StepRule]
EVERY_TERM = "*"


def build_task(task: Task | None) -> Task:
    """``task``, or the default one.

    Raises:
        TypeError: If it is no :class:`~lightning_distill.tasks.Task`.
    """
    if task is None:
        return Classification()
    check_type("task", task, Task)
    return task


def build_weighting(weights: Mapping[str, float] | Weighting | None, terms: Mapping[str, Term]) -> Weighting:
    """``weights`` as a weighting; by default each term counts 1."""
    if isinstance(weights, Weighting):
        return weights
    if weights is None:
        return FixedWeights(dict.fromkeys(terms, 1.0))
    return FixedWeights(weights)


def checked_terms(terms: Mapping[str, Term]) -> dict[str, Term]:
    """``terms`` as they were given.

    Raises:
        ValueError: If there is none, or one has the name of the sum.
        TypeError: If one is no loss term.
    """
    if not isinstance(terms, Mapping) or not terms:
        raise ValueError(f"`terms` must be loss terms by name, at least one, got {terms!r}.")
    for name, term in terms.items():
        if name == "loss":
            raise ValueError("`terms` has a term named 'loss', the name of the weighted sum; choose another name.")
        if not isinstance(term, Term):
            raise TypeError(
                f"`terms[{name!r}]` must be a loss term from `lightning_distill.losses` or a subclass of `Term`, "
                f"got {type(term).__name__}."
            )
    return dict(terms)


def checked_temperature(temperature: Temperature) -> Temperature:
    """A number as a float, a rule as it is.

    Raises:
        ValueError: If a number is not positive and finite.
        TypeError: If it is neither.
    """
    if callable(temperature):
        return temperature
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"`temperature` must be a number or a function of the step, got {type(temperature).__name__}.")
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
    return float(temperature)


def checked_item_weights(rules: ItemWeights, terms: Mapping[str, Term]) -> dict[str, StepRule]:
    """``rules`` as they were given.

    Raises:
        ValueError: If one is for a term that is not there.
    """
    if unknown := [name for name in rules if name != EVERY_TERM and name not in terms]:
        raise ValueError(
            f"`item_weights` names {unknown}, which are no terms; there are {list(terms)} and '*' for all."
        )
    return dict(rules)


def check_optimization(
    optimizer: OptimizerFactory | None, lr_scheduler: SchedulerFactory | None, lr_interval: str
) -> None:
    """Refuse what builds no optimizer or scheduler.

    Raises:
        TypeError: If ``optimizer`` or ``lr_scheduler`` cannot be called.
        ValueError: If ``lr_interval`` is neither ``"epoch"`` nor ``"step"``.
    """
    for name, factory in {"optimizer": optimizer, "lr_scheduler": lr_scheduler}.items():
        if factory is not None and not callable(factory):
            raise TypeError(
                f"`{name}` must build one, for instance `functools.partial(torch.optim.SGD, lr=0.1)`, "
                f"got {type(factory).__name__}."
            )
    if lr_interval not in ("epoch", "step"):
        raise ValueError(f"`lr_interval` must be 'epoch' or 'step', got {lr_interval!r}.")


def check_type(name: str, value: object, kind: type) -> None:
    """Refuse an argument of another type.

    Raises:
        TypeError: If ``value`` is no ``kind``.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be a {kind.__module__.split('.')[0]} {kind.__name__}, got {type(value).__name__}."
        )
