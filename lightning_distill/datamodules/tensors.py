"""Data modules over tensors in memory, with few labels, unlabelled transfer sets and label noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.datamodules.samplers import ResumableDataModule, ResumableLoader, check_seed
from lightning_distill.outputs import UNLABELLED

Pair = tuple[Tensor, Tensor]

# Added to the user's seed, so that order, choice of labels and noise are unrelated.
LABELS_SEED, NOISE_SEED = 2**60, 2**61


@dataclass(frozen=True)
class Splits:
    """Inputs and labels of each part of a data set; ``None`` where there is no such part."""

    train: Pair
    validation: Pair | None = None
    test: Pair | None = None


class Batches(Dataset[tuple[Tensor, ...]]):
    """Tensors with one row per sample, indexed once per batch instead of once per sample.

    Args:
        tensors: Of equal length.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The whole batch: the loader's fetcher calls this instead of ``__getitem__`` and needs no collation."""
        rows = torch.as_tensor(indices)
        return tuple(tensor[rows] for tensor in self.tensors)


class InMemoryDataModule(ResumableDataModule):
    """Data module over tensors that :meth:`load` returns; the common part of those below.

    Training batches are ``(inputs, labels, index)`` with each sample's position in the original training set,
    validation and test batches ``(inputs, labels)``. A label is ``-100`` where it is hidden. The global random
    number generator is never used: the order of the samples comes from ``seed`` and the epoch.

    The order of operations is: choose which labels stay, then falsify some of those. Both depend on ``seed`` alone.
    With the same seed a smaller ``num_labels`` chooses (for balanced classes) a subset of what a larger one chooses.

    Args:
        batch_size: Of training, per rank.
        eval_batch_size: Of validation and test, per rank.
        seed: Of the order, of the choice of labels and of the noise.
        num_labels: How many training labels stay, in the classes' proportions, at least one each; ``None`` for all.
        unlabelled: Whether samples without a label stay in the training set (a teacher can label them) or are
            dropped. Dropping keeps their original indices.
        label_noise: Share of the remaining labels, in [0, 1), replaced by another class, uniformly.
        num_workers: Processes that load training batches. Indexing tensors is faster than sending them, so 0.

    Raises:
        ValueError: If an argument is outside its range.
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
        super().__init__()
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if not value >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not num_workers >= 0:
            raise ValueError(f"`num_workers` must be at least 0, got {num_workers}.")
        if not 0 <= label_noise < 1:
            raise ValueError(f"`label_noise` must be in [0, 1), got {label_noise}; it is a share, not a percentage.")
        check_seed(seed)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.num_labels = num_labels
        self.unlabelled = unlabelled
        self.label_noise = label_noise
        self.num_workers = num_workers
        self._splits: Splits | None = None
        self._train: Batches | None = None

    def load(self) -> Splits:
        """The data. Called once; subclasses define it."""
        raise TypeError(f"{type(self).__name__} is an `InMemoryDataModule` without a `load()`; define one.")

    @property
    def splits(self) -> Splits:
        """The data as :meth:`load` gave it: all labels, no noise."""
        if self._splits is None:
            self._splits = self.load()
        return self._splits

    @property
    def classes(self) -> int:
        """Number of classes, one more than the largest label."""
        return int(self.splits.train[1].max()) + 1

    @property
    def train_size(self) -> int:
        """Size of the original training set: every ``index`` of a batch is below it."""
        return len(self.splits.train[0])

    @property
    def train_set(self) -> Batches:
        """The training set after ``num_labels``, ``unlabelled`` and ``label_noise``: inputs, labels and indices."""
        if self._train is None:
            inputs, labels = self.splits.train
            labelled = torch.arange(len(labels))
            if self.num_labels is not None:
                labelled = choose_stratified(labels, self.num_labels, seed=self.seed + LABELS_SEED)
            kept = corrupt_labels(labels[labelled], self.label_noise, classes=self.classes, seed=self.seed + NOISE_SEED)
            labels = torch.full_like(labels, UNLABELLED).index_put_((labelled,), kept)
            index = torch.arange(len(labels))
            if self.num_labels is not None and not self.unlabelled:
                inputs, labels, index = inputs[labelled], labels[labelled], labelled
            self._train = Batches(inputs, labels, index)
        return self._train

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once, and start at the beginning of it."""
        super().setup(stage)
        _ = self.splits

    def set_weights(self, weights: Tensor | None) -> None:
        """Draw the training samples of the next epochs in proportion to ``weights``; ``None``: each once.

        The length of an epoch stays. Call it between epochs (``on_train_epoch_end``) or before the first.

        Args:
            weights: One weight per sample of the original training set, shape ``(train_size,)``, as ``index``
                counts, the same on every rank; those of dropped samples are ignored.

        Raises:
            ValueError: If a weight is negative or not finite, all are zero, or their number is wrong.
        """
        if weights is not None:
            if weights.shape != (self.train_size,):
                raise ValueError(
                    f"`weights` must have one entry per sample of the original training set, shape "
                    f"({self.train_size},), got {tuple(weights.shape)}."
                )
            weights = weights.detach().cpu()[self.train_set.tensors[2]]
        super().set_weights(weights)

    def train_dataloader(self) -> ResumableLoader:
        """Batches ``(inputs, labels, index)``, shuffled anew in every epoch; the last may be smaller."""
        data = self.train_set
        return ResumableLoader(
            data,
            batch_size=self.batch_size,
            sampler=self.train_sampler(len(data), batch_size=self.batch_size, seed=self.seed),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=pass_through,
            generator=own_generator(),
        )

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]] | list[DataLoader[tuple[Tensor, ...]]]:
        """Batches ``(inputs, labels)`` of the validation set, in order; none if there is no such set."""
        validation = self.splits.validation
        return [] if validation is None else self._eval_dataloader(*validation)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches ``(inputs, labels)`` of the test set, in order.

        Raises:
            ValueError: If there is no test set.
        """
        if self.splits.test is None:
            raise ValueError(f"{type(self).__name__} has no test set; give it one: `test=(inputs, labels)`.")
        return self._eval_dataloader(*self.splits.test)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches ``(inputs, labels, index)`` of the original training set, in order: what a teacher is cached on.

        All samples with their own labels, whatever ``num_labels``, ``unlabelled`` and ``label_noise`` are.
        """
        inputs, labels = self.splits.train
        return self._eval_dataloader(inputs, labels, torch.arange(len(labels)))

    def _eval_dataloader(self, *tensors: Tensor) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            Batches(*tensors), batch_size=self.eval_batch_size, collate_fn=pass_through, generator=own_generator()
        )


class TensorDataModule(InMemoryDataModule):
    """Data module over the user's own tensors.

    Args:
        train: Inputs ``(N, ...)`` and class indices ``(N,)``, ``-100`` where there is no label.
        validation: The same, or ``None``; then fit with ``limit_val_batches=0``.
        test: The same, or ``None``.
        batch_size: See :class:`InMemoryDataModule`, as for all that follow.
        eval_batch_size: …
        seed: …
        num_labels: …
        unlabelled: …
        label_noise: …
        num_workers: …

    Raises:
        ValueError: If an argument is outside its range, a set is empty, or inputs and labels differ in number.
        TypeError: If labels are not integers.

    Example:
        >>> x, y = torch.randn(20, 3), torch.arange(20) % 4
        >>> data = TensorDataModule((x, y), num_labels=8, batch_size=5)
        >>> inputs, labels, index = next(iter(data.train_dataloader()))
        >>> inputs.shape, torch.equal(inputs, x[index])
        (torch.Size([5, 3]), True)
    """

    def __init__(
        self,
        train: Pair,
        validation: Pair | None = None,
        test: Pair | None = None,
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
        for name, pair in {"train": train, "validation": validation, "test": test}.items():
            if pair is not None:
                _check_pair(*pair, name=name)
        self._splits = Splits(train, validation, test)
        _ = self.train_set  # checks `num_labels`

    def load(self) -> Splits:
        """The tensors that were given."""
        assert self._splits is not None
        return self._splits


def choose_stratified(labels: Tensor, count: int, *, seed: int) -> Tensor:
    """Choose ``count`` labelled samples, each class in proportion to its size and at least once.

    Args:
        labels: Class indices, shape ``(N,)``; samples with ``-100`` are never chosen.
        count: How many, from the number of classes to the number of labels.
        seed: Of the choice.

    Returns:
        Positions in ascending order, shape ``(count,)``.

    Raises:
        ValueError: If there are fewer labels than ``count``, or more classes.

    Example:
        >>> choose_stratified(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 4, seed=0).shape
        torch.Size([4])
    """
    present, sizes = torch.unique(labels[labels != UNLABELLED], return_counts=True)
    check_num_labels(count, size=int(sizes.sum()), classes=len(present))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label, quota in zip(present, _quotas(sizes, count), strict=True):
        members = (labels == label).nonzero().squeeze(1)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:quota]])
    return torch.cat(chosen).sort().values


def _quotas(sizes: Tensor, count: int) -> list[int]:
    """One per class, the rest in proportion to what is left of each, by largest remainder."""
    left = (sizes - 1).double()
    exact = (count - len(sizes)) * left / left.sum().clamp_min(1)
    quotas = exact.floor()
    missing = count - len(sizes) - int(quotas.sum())
    quotas[(exact - quotas).argsort(descending=True, stable=True)[:missing]] += 1
    return [1 + int(quota) for quota in quotas]


def corrupt_labels(labels: Tensor, rate: float, *, classes: int, seed: int) -> Tensor:
    """Replace ``round(rate * N)`` of the labels by another class, drawn uniformly from the ``classes - 1`` others.

    Args:
        labels: Class indices, shape ``(N,)``; ``-100`` stays and does not count.
        rate: Share of wrong labels afterwards, in [0, 1).
        classes: Number of classes, at least 2 if ``rate`` is positive.
        seed: Of the choice.

    Returns:
        New labels, shape ``(N,)``.

    Raises:
        ValueError: If ``rate`` or ``classes`` is outside its range.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"`rate` must be in [0, 1), got {rate}.")
    if rate > 0 and not classes >= 2:
        raise ValueError(f"`classes` must be at least 2 for noise in labels, got {classes}.")
    generator = torch.Generator().manual_seed(seed)
    positions = (labels != UNLABELLED).nonzero().squeeze(1)
    wrong = positions[torch.randperm(len(positions), generator=generator)[: round(rate * len(positions))]]
    shift = torch.randint(1, max(classes, 2), (len(wrong),), generator=generator)
    return labels.index_put((wrong,), (labels[wrong] + shift) % classes)


def check_num_labels(num_labels: int | None, *, size: int, classes: int) -> None:
    """Refuse a number of labels that is not from ``classes`` to ``size``.

    Raises:
        ValueError: If it is not.
    """
    if num_labels is not None and not classes <= num_labels <= size:
        raise ValueError(
            f"`num_labels` must be between {classes} (one per class) and {size} (all labels), got {num_labels}."
        )


def pass_through(batch: Any) -> Any:
    """Collation of what is a batch already."""
    return batch


def own_generator() -> torch.Generator:
    """A generator for a loader, which would otherwise draw a number from the global one in every epoch."""
    return torch.Generator().manual_seed(0)


def _check_pair(inputs: Tensor, labels: Tensor, *, name: str) -> None:
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"`{name}` needs integer class indices as labels, got {labels.dtype}; `labels.long()`.")
    if len(inputs) == 0:
        raise ValueError(f"`{name}` is empty: inputs of shape {tuple(inputs.shape)}.")
    if labels.shape != inputs.shape[:1]:
        raise ValueError(
            f"`{name}` needs one label per input, got inputs of shape {tuple(inputs.shape)} and labels of shape "
            f"{tuple(labels.shape)}."
        )


__all__ = ["Batches", "InMemoryDataModule", "Splits", "TensorDataModule", "choose_stratified", "corrupt_labels"]
