"""What a constructor has said, out of what the parser makes of it."""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException

Built = TypeVar("Built")

REFUSALS = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
"""What constructors raise for arguments that they do not accept; everything else is a mistake in the code."""


class ConfigurationError(ValueError):
    """A class that a configuration names does not accept its arguments."""


def build_plainly(build: Callable[[], Built]) -> Built:
    """``build()``, which lets a parser build classes, with the errors of their constructors as they were raised.

    The parser tries a value as each type that its parameter may have, and reports everything that it has tried.

    Raises:
        ConfigurationError: If a class does not accept its arguments: what it said, behind the key that it belongs to.
    """
    try:
        return build()
    except Exception as error:
        found = _raised_by_constructor(error)
        if found is None:
            raise
    raised, keys = found
    if isinstance(raised, REFUSALS):
        raise ConfigurationError(f"`{'.'.join(keys)}`: {raised}" if keys else str(raised)) from raised
    raise raised


def _raised_by_constructor(error: BaseException) -> tuple[BaseException, list[str]] | None:
    """The error behind ``error`` that was raised outside of the parser, and the keys that lead to its class.

    The parser has no hook for it. It keeps the errors of a value's types in a list while it raises its own, and names
    one that it translates as the cause.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in frames]
    keys = [owner.dest for owner in owners if isinstance(owner, argparse.Action)]
    if not frames:
        return None
    last = frames[-1]
    if not last.f_globals.get("__name__", "").startswith("jsonargparse"):
        return error, keys
    for behind in _behind(error, list(last.f_locals.values())):
        if (found := _raised_by_constructor(behind)) is not None:
            return found[0], keys + found[1]
    return None


def _behind(error: BaseException, kept: list[object]) -> Iterator[BaseException]:
    for value in kept:
        if isinstance(value, list):
            yield from (item for item in value if isinstance(item, BaseException))
    if error.__cause__ is not None:
        yield error.__cause__
