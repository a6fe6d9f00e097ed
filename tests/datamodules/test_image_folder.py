"""Images in folders: classes, splits, pixels, cache, and a training on them."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_distill import KD
from lightning_distill.datamodules import ImageFolderDataModule
from lightning_distill.datamodules.image_folder import read_image
from lightning_distill.networks import ConvNet2d

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


def fill(folder, count, names=COLOURS, size=(12, 9)):
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = generator.integers(0, 40, (*size, 3))
            pixels = np.clip(np.array(COLOURS.get(name, (9, 9, 9))) - noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "images", 20)
    return tmp_path / "images"


def test_classes_and_parts_are_those_of_the_folders(folder):
    data = ImageFolderDataModule(folder, size=8)
    data.setup()
    assert data.class_names == ["blue", "green", "red"]
    assert data.classes == 3
    parts = [data.splits.train, data.splits.validation, data.splits.test]
    assert [tuple(x.shape) for x, _ in parts] == [(48, 3, 8, 8), (6, 3, 8, 8), (6, 3, 8, 8)]
    assert all(torch.bincount(y).tolist() == [len(y) // 3] * 3 for _, y in parts)
    for inputs, labels in parts:
        assert inputs.min() >= 0
        assert inputs.max() <= 1
        # the brightest channel of a blue image is the last
        assert torch.equal(inputs.mean((2, 3)).argmax(1), 2 - labels)
    images = torch.cat([x.flatten(1) for x, _ in parts])
    assert len(images.unique(dim=0)) == 60  # no image is in two parts
    other = ImageFolderDataModule(folder, size=8, seed=7)
    assert torch.equal(other.splits.test[0], data.splits.test[0])
    none = ImageFolderDataModule(folder, validation=0.0, test=0.0).splits
    assert (none.validation, none.test, len(none.train[0])) == (None, None, 60)


def test_folders_of_parts_are_used(tmp_path):
    for name, count in {"train": 6, "val": 2, "test": 3}.items():
        fill(tmp_path / "parts" / name, count)
    splits = ImageFolderDataModule(tmp_path / "parts", size=4).splits
    assert [len(part[0]) for part in (splits.train, splits.validation, splits.test)] == [18, 6, 9]
    fill(tmp_path / "some" / "train", 10)
    fill(tmp_path / "some" / "test", 1)
    splits = ImageFolderDataModule(tmp_path / "some", size=4).splits
    assert [len(part[0]) for part in (splits.train, splits.validation, splits.test)] == [27, 3, 3]


def test_an_image_is_cut_to_a_square_in_its_middle(tmp_path):
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = (10, 20, 30)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    pixels = read_image(tmp_path / "wide.png", 10)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 10, 10))
    grey = read_image(tmp_path / "wide.png", 5, 1)
    assert grey.shape == (1, 5, 5)
    assert (grey.float() - 18).abs().max() <= 1  # 0.299 R + 0.587 G + 0.114 B


def test_a_second_run_reads_no_image_until_one_changes(folder, cache, monkeypatch):
    first = ImageFolderDataModule(folder, size=8).splits
    read = []
    from lightning_distill.datamodules import image_folder

    monkeypatch.setattr(image_folder, "read_image", lambda *a: read.append(a) or read_image(*a))
    again = ImageFolderDataModule(folder, size=8).splits
    assert read == []
    assert torch.equal(again.train[0], first.train[0])
    Image.new("RGB", (9, 9)).save(folder / "red" / "0.png")
    changed = ImageFolderDataModule(folder, size=8).splits
    assert len(read) == 60
    assert not torch.equal(torch.cat([changed.train[0], changed.test[0]]), torch.cat([first.train[0], first.test[0]]))


def test_an_image_that_changes_without_its_size_is_read_again(folder):
    for name, colour in {"grey": (80, 80, 80), "white": (255, 255, 255)}.items():
        (folder / name).mkdir()
        Image.new("RGB", (8, 8), colour).save(folder / name / "0.bmp")
    picture = folder / "grey" / "0.bmp"
    arguments = {"size": 4, "validation": 0.0, "test": 0.0}
    before = ImageFolderDataModule(folder, **arguments).splits.train
    size = picture.stat().st_size
    Image.new("RGB", (8, 8), (160, 160, 160)).save(picture)
    os.utime(picture, ns=(0, 1))
    assert picture.stat().st_size == size
    after = ImageFolderDataModule(folder, **arguments).splits.train
    grey = int((before[1] == 2).nonzero()[0])  # blue, green, grey, red, white
    assert before[0][grey].unique().tolist() == pytest.approx([80 / 255])
    assert after[0][grey].unique().tolist() == pytest.approx([160 / 255])


def test_a_network_learns_from_them(folder, make_trainer):
    data = ImageFolderDataModule(folder, size=8, batch_size=16, num_labels=12)
    module = KD(ConvNet2d((4, 4), classes=3, channels=3), alpha=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=0.02))
    trainer = make_trainer(max_epochs=10)
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    assert found["test/accuracy"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"size": 0}, ValueError, "`size` must be at least 1, got 0"),
        ({"channels": 2}, ValueError, r"`channels` must be 1 \(grey\) or 3 \(colours\), got 2"),
        ({"test": 1.0}, ValueError, r"`test` must be in \[0, 1\), got 1.0"),
        ({"folder": "nowhere"}, FileNotFoundError, "There is no folder 'nowhere'"),
        ({"validation": 0.6, "test": 0.39}, ValueError, "There are too few images, 60 of 3 classes"),
    ],
)
def test_bad_arguments(folder, arguments, kind, message):
    with pytest.raises(kind, match=message):
        ImageFolderDataModule(**{"folder": folder} | arguments).setup()


def test_bad_folders(tmp_path, folder):
    (tmp_path / "one" / "only").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a folder for each class, at least two, got \['only'\]"):
        ImageFolderDataModule(tmp_path / "one").setup()
    (folder / "void").mkdir()
    with pytest.raises(ValueError, match="The class 'void' has no image in"):
        ImageFolderDataModule(folder).setup()
    (folder / "void" / "broken.png").write_text("no image")
    with pytest.raises(ValueError, match=r"broken.png' cannot be read as an image"):
        ImageFolderDataModule(folder).setup()
    fill(tmp_path / "parts" / "train", 2)
    fill(tmp_path / "parts" / "test", 1, names=["blue", "red"])
    with pytest.raises(ValueError, match=r"test' are \['blue', 'red'\], those to train on"):
        ImageFolderDataModule(tmp_path / "parts", validation=0.0).setup()
