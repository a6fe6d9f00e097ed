"""Images in folders, one folder per class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_distill.datamodules.disk_cache import cached
from lightning_distill.datamodules.tensors import InMemoryDataModule, Splits, choose_stratified

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SPLITS = (("train",), ("validation", "val", "valid"), ("test",))
VALIDATION_SEED, TEST_SEED = 2**59, 2**58


class ImageFolderDataModule(InMemoryDataModule):
    """Images of a folder with a subfolder per class, or with ``train``, ``validation`` and ``test`` of such folders.

    Classes are numbered in alphabetical order. Images are scaled such that the shorter side fits, and cut to a square
    in the middle; pixels are float32 in [0, 1]. All are kept in memory, ``(N, channels, size, size)``, and the scaled
    pixels on disk (``LIGHTNING_DISTILL_CACHE``), so that a second run reads no image. Where there is no folder
    ``validation`` or ``test``, its share is taken from the training images, each class in proportion, by ``seed=0``
    whatever the module's seed is.

    Args:
        folder: With a subfolder per class, or with subfolders ``train`` and so on that have them.
        size: Height and width, pixels.
        channels: 3 for colours, 1 for grey.
        validation: Share of the training images, in [0, 1), where the folder has no ``validation``; 0 for no such set.
        test: The same.
        batch_size: See :class:`InMemoryDataModule`, as for all that follow.
        eval_batch_size: …
        seed: …
        num_labels: …
        unlabelled: …
        label_noise: …
        num_workers: …

    Raises:
        ValueError: If an argument is outside its range; in ``setup``, if there are fewer than two classes, a class has
            no image, an image cannot be read, or the parts have different classes.
        FileNotFoundError: In ``setup``, if there is no such folder.

    Example:
        >>> ImageFolderDataModule("photos", size=64).size
        64
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: int = 32,
        channels: Literal[1, 3] = 3,
        validation: float = 0.1,
        test: float = 0.1,
        batch_size: int = 100,
        eval_batch_size: int = 500,
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
        if not size >= 1:
            raise ValueError(f"`size` must be at least 1, got {size}.")
        if channels not in (1, 3):
            raise ValueError(f"`channels` must be 1 (grey) or 3 (colours), got {channels}.")
        for name, share in {"validation": validation, "test": test, "validation + test": validation + test}.items():
            if not 0 <= share < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {share}; it is a share of the images.")
        self.folder = Path(folder)
        self.size = size
        self.channels: Literal[1, 3] = channels
        self.shares = (validation, test)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in their order."""
        folders = _part_folders(self.folder)
        return sorted(path.name for path in folders[0].iterdir() if path.is_dir())

    def load(self) -> Splits:
        """The images, split."""
        folders = _part_folders(self.folder)
        names = self.class_names
        if len(names) < 2:
            raise ValueError(f"{str(folders[0])!r} must have a folder for each class, at least two, got {names}.")
        parts = [None if folder is None else self._images(folder, names) for folder in folders]
        train, validation, test = parts
        assert train is not None
        rest = torch.arange(len(train[1]))
        if test is None:
            rest, test = _take(train, rest, self.shares[1], TEST_SEED, of=len(train[1]))
        if validation is None:
            rest, validation = _take(train, rest, self.shares[0], VALIDATION_SEED, of=len(train[1]))
        return Splits((train[0][rest], train[1][rest]), validation, test)

    def _images(self, folder: Path, names: Sequence[str]) -> tuple[Tensor, Tensor]:
        found = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if found != list(names):
            raise ValueError(f"The classes in {str(folder)!r} are {found}, those to train on {list(names)}.")
        files = [
            (path, label)
            for label, name in enumerate(names)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in ENDINGS
        ]
        counts = torch.bincount(torch.tensor([label for _, label in files], dtype=torch.long), minlength=len(names))
        if empty := [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]:
            raise ValueError(
                f"The class {empty[0]!r} has no image in {str(folder / empty[0])!r}; known endings are "
                f"{', '.join(ENDINGS)}."
            )
        content = hashlib.blake2b(f"{self.size} {self.channels}".encode(), digest_size=16)
        for path, label in files:
            about = path.stat()
            content.update(f"{label} {path.resolve()} {about.st_size} {about.st_mtime_ns}\n".encode())
        saved = cached(f"images-{content.hexdigest()}.pt", lambda: {"pixels": self._read([path for path, _ in files])})
        return saved["pixels"].float() / 255, torch.tensor([label for _, label in files])

    def _read(self, files: Sequence[Path]) -> Tensor:
        return torch.stack([read_image(path, self.size, self.channels) for path in files])


def read_image(path: Path, size: int, channels: Literal[1, 3] = 3) -> Tensor:
    """An image as ``(channels, size, size)`` bytes: scaled such that the shorter side fits, and cut in the middle.

    Raises:
        ValueError: If the file is no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            fitted = ImageOps.fit(opened.convert("L" if channels == 1 else "RGB"), (size, size))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as an image: {error}") from error
    pixels: Any = np.array(fitted)
    return torch.from_numpy(pixels).view(size, size, channels).permute(2, 0, 1).contiguous()


def _part_folders(folder: Path) -> tuple[Path, Path | None, Path | None]:
    """Folders of training, validation and test; ``folder`` itself and nothing where it has the classes."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}.")
    found = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in SPLITS]
    return (folder, None, None) if found[0] is None else (found[0], found[1], found[2])


def _take(
    pair: tuple[Tensor, Tensor], rest: Tensor, share: float, seed: int, *, of: int
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``share`` of the samples out of ``rest``, each class in proportion, and what is left of ``rest``."""
    if share == 0:
        return rest, None
    classes = len(pair[1].unique())
    count = max(round(share * of), classes)
    if len(rest) - count < classes:
        raise ValueError(
            f"There are too few images, {of} of {classes} classes, to set a share of {share} apart; each part needs "
            "one of each class. Add images, or set `validation` or `test` to 0."
        )
    chosen = rest[choose_stratified(pair[1][rest], count, seed=seed)]
    left = torch.ones(of, dtype=torch.bool).index_fill_(0, chosen, False)[rest]
    return rest[left], (pair[0][chosen], pair[1][chosen])


__all__ = ["ImageFolderDataModule", "read_image"]
