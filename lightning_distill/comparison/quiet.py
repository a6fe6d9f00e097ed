"""Lightning without the remarks that a comparison would repeat at every run."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")

EXPECTED_WARNINGS = (
    r".*does not have many workers",  # small data sets are faster in the main process
    r"The number of training batches .* is smaller than the logging interval",  # small data sets again
    r"Found \d+ module\(s\) in eval mode",  # the frozen teacher
    r"Checkpoint directory .* exists and is not empty",  # a resumed run finds its own folder
    r".*LeafSpec.* is deprecated",  # Lightning 2.6 with torch 2.13
    r"Experiment logs directory .* exists and is not empty",  # a resumed run finds its own folder
)


@contextlib.contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silence Lightning's information (hardware, tips, "Trainer.fit stopped") and :data:`EXPECTED_WARNINGS`, no other.

    Warnings of the user's code and unexpected warnings of Lightning come through.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
