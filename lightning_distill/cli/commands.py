"""From a command line to a call: what the commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import lightning as L
from jsonargparse import ArgumentParser

from lightning_distill.cli.building import ConfigurationError
from lightning_distill.cli.trainer import DistillationCLI, stop

Result = TypeVar("Result")
CLI = TypeVar("CLI", bound=DistillationCLI)
Errors = tuple[type[Exception], ...]


def call_with_options(
    function: Callable[..., Result], arguments: Sequence[str], *, errors: Errors = (ValueError, TypeError, OSError)
) -> Result:
    """Call ``function`` with the options of a command line and of the YAML file after ``-c``.

    Args:
        function: Its parameters are the options, its docstring the help.
        arguments: The command's name, then its options.
        errors: Of these the message alone is shown, and the program ends.
    """
    command, *options = arguments
    summary = (function.__doc__ or "").split("Args:")[0]
    parser = ArgumentParser(prog=f"lightning-distill {command}", description=summary)
    parser.add_argument("-c", "--config", action="config", help="Path of a YAML file with the options below.")
    parser.add_function_arguments(function)
    parsed = parser.parse_args(options)
    parsed.pop("config")
    try:
        return function(**parsed.as_dict())
    except errors as error:
        stop(command, error)


def use_configuration(
    kind: type[CLI], arguments: Sequence[str], work: Callable[[CLI], None], *, errors: Errors = (ValueError, TypeError)
) -> None:
    """Build model and data of a configuration of ``fit``, and let ``work`` use them.

    Args:
        kind: Knows the command's own options.
        arguments: The command's name, then its options.
        work: Called with the command line, whose ``model``, ``datamodule`` and ``trainer`` are built.
        errors: Of these, raised by ``work``, the message alone is shown, and the program ends.
    """
    before = sys.argv
    sys.argv = [before[0], *arguments[1:]]
    try:
        cli = kind(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=42,
            run=False,
        )
        sys.argv = [before[0], *arguments]  # the Trainer starts the other processes of a distributed run from it
        try:
            work(cli)
        except errors as error:
            stop(arguments[0], error)
    except ConfigurationError as error:
        stop(arguments[0], error)
    finally:
        sys.argv = before
