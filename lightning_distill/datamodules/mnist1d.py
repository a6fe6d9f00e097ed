"""MNIST-1D: ten classes of short signals, generated on the spot."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from lightning_distill.datamodules.disk_cache import cached
from lightning_distill.datamodules.tensors import InMemoryDataModule, Pair, Splits, check_num_labels

TRAIN_SIZE = 4000
VALIDATION_SIZE = 1000
CLASSES = 10


class MNIST1DDataModule(InMemoryDataModule):
    """MNIST-1D (Greydanus, 2020, https://arxiv.org/abs/2011.14439), 4000 signals to train on, 1000 to test on.

    The package ``mnist1d`` generates them with its default arguments; nothing is downloaded. Inputs have shape
    ``(B, 1, 40)`` and, over the data set, mean 0 and standard deviation 1. The published split has no validation set,
    and its 4000 training signals are all used for training; since the data are procedural, the 1000 signals of
    the validation set are fresh ones, generated with another seed.

    Generation takes a few seconds once; the result is kept in the folder that the environment variable
    ``LIGHTNING_DISTILL_CACHE`` names, by default ``~/.cache/lightning_distill``.

    Args:
        batch_size: Of training, per rank.
        eval_batch_size: Of validation and test, per rank.
        seed: Of the order, of the choice of labels and of the noise; the signals are always the same.
        num_labels: How many training labels stay, in the classes' proportions; ``None`` for all 4000.
        unlabelled: Whether samples without a label stay in the training set or are dropped.
        label_noise: Share of the remaining labels, in [0, 1), replaced by another class, uniformly.
        num_workers: Processes that load training batches.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> data = MNIST1DDataModule(num_labels=200, unlabelled=False)
        >>> data.num_labels
        200
    """

    def __init__(
        self,
        *,
        batch_size: int = 100,
        eval_batch_size: int = 1000,
        seed: int = 0,
        num_labels: int | None = None,
        unlabelled: bool = True,
        label_noise: float = 0.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            num_labels=num_labels,
            unlabelled=unlabelled,
            label_noise=label_noise,
            num_workers=num_workers,
        )
        check_num_labels(num_labels, size=TRAIN_SIZE, classes=CLASSES)

    def prepare_data(self) -> None:
        """Generate the data on one process per node, so that the others find them on disk."""
        mnist1d()

    def load(self) -> Splits:
        """The generated signals."""
        return mnist1d()


@functools.cache
def mnist1d() -> Splits:
    """The 4000 training and 1000 test signals, and 1000 more for validation; ``(N, 1, 40)`` and labels ``(N,)``."""
    saved = cached(f"mnist1d-{version('mnist1d')}.pt", _generate_all)
    x, y = saved["x"], saved["y"]
    return Splits(
        train=(x[:TRAIN_SIZE], y[:TRAIN_SIZE]),
        validation=(saved["x_validation"], saved["y_validation"]),
        test=(x[TRAIN_SIZE:], y[TRAIN_SIZE:]),
    )


def _generate_all() -> dict[str, Tensor]:
    inputs, labels = generate(seed=42)
    fresh_inputs, fresh_labels = generate(seed=43, num_samples=VALIDATION_SIZE)
    return {"x": inputs, "y": labels, "x_validation": fresh_inputs, "y_validation": fresh_labels}


def generate(*, seed: int = 42, num_samples: int = 5000) -> Pair:
    """Generate signals with the package's default arguments; the caller's random state stays as it is.

    Args:
        seed: 42 is the published data set's.
        num_samples: A multiple of 10; with the published data set's 5000 the first 4000 are its training set.

    Returns:
        Standardised signals, shape ``(num_samples, 1, 40)``, and class indices, shape ``(num_samples,)``.
    """
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.seed = seed
    arguments.num_samples = num_samples
    with _global_random_state_kept():
        data = make_dataset(arguments)
    inputs = np.concatenate([data["x"], data["x_test"]]).astype(np.float32)
    labels = np.concatenate([data["y"], data["y_test"]]).astype(np.int64)
    return torch.from_numpy(inputs).unsqueeze(1), torch.from_numpy(labels)


@contextmanager
def _global_random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generators that the package seeds
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


__all__ = ["MNIST1DDataModule", "generate", "mnist1d"]
