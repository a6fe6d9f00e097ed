"""A small batch of a loader's data that leaves the loader where it is."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, IterableDataset


def first_samples(loader: Any, count: int = 2) -> Any:
    """The first samples of the data set, collated as the loader does.

    The loader's sampler, workers and random numbers are not touched. Where the data set has no order of its own
    (an iterable one, or something that is no ``DataLoader``), it is the loader's first batch.

    Args:
        loader: Of training.
        count: How many, as far as there are.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return next(iter(loader))
    dataset: Any = loader.dataset
    rows = list(range(min(count, len(dataset))))
    samples = dataset.__getitems__(rows) if hasattr(dataset, "__getitems__") else [dataset[row] for row in rows]
    return loader.collate_fn(samples)
