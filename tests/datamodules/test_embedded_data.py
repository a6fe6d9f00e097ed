"""The data sets that come with the package's dependencies, and the import guard."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_distill.datamodules import DigitsDataModule, MNIST1DDataModule, mnist1d
from lightning_distill.networks import ConvNet1d

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LIGHTNING_DISTILL_CACHE", str(folder))
        mnist1d.mnist1d.cache_clear()
        yield folder
        mnist1d.mnist1d.cache_clear()


def test_mnist1d_is_the_published_split_and_validates_on_fresh_signals(cache):
    module = MNIST1DDataModule()
    module.prepare_data()
    module.setup("fit")
    splits = module.splits
    sizes = {"train": 4000, "validation": 1000, "test": 1000}
    for name, size in sizes.items():
        inputs, labels = getattr(splits, name)
        assert inputs.shape == (size, 1, 40)
        assert inputs.dtype == torch.float32
        assert labels.shape == (size,)
        assert labels.unique().tolist() == list(range(10))
        torch.testing.assert_close(inputs.mean(), torch.tensor(0.0), rtol=0, atol=0.01)
        torch.testing.assert_close(inputs.std(), torch.tensor(1.0), rtol=0, atol=0.02)
    # The package shuffles 500 of each class, then splits.
    assert (splits.train[1].bincount() + splits.test[1].bincount()).tolist() == [500] * 10
    assert splits.validation[1].bincount().tolist() == [100] * 10
    seen = {tuple(row) for row in splits.train[0].squeeze(1).tolist()}
    for name in ("validation", "test"):
        assert seen.isdisjoint(map(tuple, getattr(splits, name)[0].squeeze(1).tolist()))
    assert ConvNet1d()(next(iter(module.train_dataloader()))[0]).shape == (100, 10)


def test_mnist1d_is_generated_once_and_kept_on_disk(cache, monkeypatch):
    first = mnist1d.mnist1d()
    (file,) = cache.iterdir()
    assert mnist1d.mnist1d() is first
    mnist1d.mnist1d.cache_clear()
    monkeypatch.setattr(mnist1d, "generate", lambda **kwargs: pytest.fail("generated although it is on disk"))
    again = mnist1d.mnist1d()
    assert torch.equal(again.train[0], first.train[0])
    assert torch.equal(again.validation[1], first.validation[1])
    assert file.name.startswith("mnist1d-")


def test_a_damaged_file_is_replaced_and_an_unusable_folder_only_costs_time(tmp_path, monkeypatch):
    calls = []

    def few(*, seed=42, num_samples=5000):
        calls.append(seed)
        return torch.zeros(num_samples, 1, 40), torch.zeros(num_samples, dtype=torch.long)

    monkeypatch.setattr(mnist1d, "generate", few)
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(tmp_path))
    load = mnist1d.mnist1d.__wrapped__
    load()
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half a file")
    load()
    assert calls == [42, 43] * 2
    load()
    assert calls == [42, 43] * 2
    monkeypatch.setenv("LIGHTNING_DISTILL_CACHE", str(file))  # a file where a folder should be
    assert len(load().train[0]) == 4000
    assert calls == [42, 43] * 3


def test_generation_is_reproducible_and_leaves_every_global_random_state_alone():
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    expected = random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(0)
    first = mnist1d.generate(seed=1, num_samples=50)
    assert (random.random(), np.random.rand(), torch.rand(())) == expected  # noqa: NPY002
    second, other = mnist1d.generate(seed=1, num_samples=50), mnist1d.generate(seed=2, num_samples=50)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])


def test_the_package_itself_gives_the_same_signals():
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    arguments.num_samples, arguments.seed = 50, 42
    theirs = make_dataset(arguments)
    inputs, labels = mnist1d.generate(seed=42, num_samples=50)
    np.testing.assert_allclose(inputs[40:, 0].numpy(), theirs["x_test"], rtol=1e-6)
    assert labels[:40].tolist() == theirs["y"].tolist()


def test_digits_are_split_by_class_without_overlap_and_scaled():
    splits = DigitsDataModule().splits
    parts = (splits.train, splits.validation, splits.test)
    assert [len(labels) for _, labels in parts] == [900, 297, 600]
    for inputs, labels in parts:
        assert inputs.shape == (len(labels), 1, 8, 8)
        assert inputs.min() == 0
        assert inputs.max() == 1
        share = labels.bincount(minlength=10) / len(labels)
        torch.testing.assert_close(share, torch.full((10,), 0.1), rtol=0, atol=0.006)
    from sklearn.datasets import load_digits

    pixels, _ = load_digits(return_X_y=True)
    ours = torch.cat([inputs.flatten(1) for inputs, _ in parts]) * 16
    assert sorted(map(tuple, ours.tolist())) == sorted(map(tuple, pixels.tolist()))


def test_flat_digits_are_the_same_pixels():
    flat, images = DigitsDataModule(flat=True, seed=1), DigitsDataModule(seed=1)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        rows, pictures = next(iter(getattr(flat, loader)())), next(iter(getattr(images, loader)()))
        assert rows[0].shape[1:] == (64,)
        assert torch.equal(rows[0], pictures[0].flatten(1))
        assert torch.equal(rows[1], pictures[1])


def test_fifty_labels_and_the_rest_as_transfer_set():
    _, labels, _ = (torch.cat(parts) for parts in zip(*DigitsDataModule(num_labels=50).train_dataloader(), strict=True))
    assert labels[labels >= 0].bincount().tolist() == [5] * 10
    assert (labels == -100).sum() == 850
    few = DigitsDataModule(num_labels=50, unlabelled=False)
    assert sum(len(batch[0]) for batch in few.train_dataloader()) == 50


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    from lightning_distill.datamodules import digits

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "lightning-distill\[digits\]"'):
        digits.digits.__wrapped__()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MNIST1DDataModule(num_labels=4001), "`num_labels` must be between 10 .* and 4000 .* got 4001"),
        (lambda: DigitsDataModule(num_labels=9), "`num_labels` must be between 10 .* and 900 .* got 9"),
    ],
)
def test_rejects_a_number_of_labels_before_the_data_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_link_at_the_top_cannot_be_imported():
    """It would give every class a second time: isinstance would fail, far from here."""
    result = subprocess.run(
        [sys.executable, "-c", "import datamodules"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1
    assert "ImportError: import lightning_distill.datamodules, not datamodules" in result.stderr
