"""Handwritten digits, 8×8 pixels, from the scikit-learn package."""

from __future__ import annotations

import functools

import torch

from lightning_distill.datamodules.tensors import InMemoryDataModule, Splits, check_num_labels, choose_stratified

TRAIN_SIZE = 900
VALIDATION_SIZE = 297
TEST_SIZE = 600
CLASSES = 10


class DigitsDataModule(InMemoryDataModule):
    """The 1797 digits of scikit-learn: 900 to train on, 297 for validation, 600 to test on.

    The split has the classes' proportions and is always the same. Pixels are scaled to [0, 1]. The images come with
    the package; nothing is downloaded.

    Args:
        flat: Inputs of shape ``(B, 64)`` instead of ``(B, 1, 8, 8)``.
        batch_size: Of training, per rank.
        eval_batch_size: Of validation and test, per rank.
        seed: Of the order, of the choice of labels and of the noise.
        num_labels: How many training labels stay, in the classes' proportions; ``None`` for all 900.
        unlabelled: Whether samples without a label stay in the training set or are dropped.
        label_noise: Share of the remaining labels, in [0, 1), replaced by another class, uniformly.
        num_workers: Processes that load training batches.

    Raises:
        ValueError: If an argument is outside its range.

    Example:
        >>> DigitsDataModule(num_labels=50).num_labels
        50
    """

    def __init__(
        self,
        *,
        flat: bool = False,
        batch_size: int = 50,
        eval_batch_size: int = 600,
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
        self.flat = flat

    def load(self) -> Splits:
        """The images, split."""
        splits = digits()
        if not self.flat:
            return splits
        assert splits.validation is not None
        assert splits.test is not None
        return Splits(
            *((inputs.flatten(1), labels) for inputs, labels in (splits.train, splits.validation, splits.test))
        )


@functools.cache
def digits() -> Splits:
    """Images ``(N, 1, 8, 8)`` in [0, 1] and labels ``(N,)``, split 900 / 297 / 600.

    Raises:
        ModuleNotFoundError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'DigitsDataModule reads the images of scikit-learn: pip install "lightning-distill[digits]"'
        ) from error
    pixels, targets = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    labels = torch.from_numpy(targets).long()
    test = choose_stratified(labels, TEST_SIZE, seed=0)
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, test, False).nonzero().squeeze(1)
    validation = rest[choose_stratified(labels[rest], VALIDATION_SIZE, seed=0)]
    train = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, torch.cat([test, validation]), False)
    return Splits((inputs[train], labels[train]), *((inputs[part], labels[part]) for part in (validation, test)))


__all__ = ["DigitsDataModule", "digits"]
