"""A run that stops somewhere and is resumed sees what an uninterrupted run sees, batch for batch."""

import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distill.datamodules import TensorDataModule

# The resumed runs save nothing.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create")
SAMPLES, BATCH_SIZE, EPOCHS = 22, 4, 3
BATCHES = 6  # per epoch, the last of two samples


class Recorder(L.LightningModule):
    """Keeps the indices of its batches; may fail at a step."""

    def __init__(self, fail_at=None, asks_for_length=False):
        super().__init__()
        self.layer = torch.nn.Linear(1, 2)
        self.fail_at = fail_at
        self.asks_for_length = asks_for_length
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.fail_at:
            raise RuntimeError("killed")
        self.seen.append(batch[2].tolist())
        return self.layer(batch[0]).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.asks_for_length:  # makes the loader's first iterator before the checkpoint's counters are loaded
            assert self.trainer.estimated_stepping_batches == EPOCHS * BATCHES
        return torch.optim.SGD(self.parameters(), lr=0.01)


def data(num_workers=0, validation=True, **kwargs):
    x, y = torch.arange(SAMPLES).float().unsqueeze(1), torch.arange(SAMPLES) % 2
    kwargs = {"batch_size": BATCH_SIZE, "num_workers": num_workers, "seed": 3} | kwargs
    return TensorDataModule((x, y), (x, y) if validation else None, **kwargs)


def trainer(callbacks=(), **kwargs):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        callbacks=list(callbacks),
        **kwargs,
    )


@pytest.fixture(scope="module")
def uninterrupted():
    module = Recorder()
    trainer(max_epochs=EPOCHS).fit(module, datamodule=data())
    return module.seen


def test_every_epoch_is_every_sample_once_in_another_order(uninterrupted):
    epochs = [list(itertools.chain(*uninterrupted[i : i + BATCHES])) for i in range(0, len(uninterrupted), BATCHES)]
    assert len(epochs) == EPOCHS
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == EPOCHS


class SaveOnException(L.Callback):
    def __init__(self, folder):
        self.path = folder / "stop.ckpt"

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


def at_step(folder, step):
    return ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=1, filename="stop"), {"fail_at": step}


STOPS = {
    "killed in an epoch": lambda folder: (*at_step(folder, 9), {}),
    "killed in the first epoch": lambda folder: (*at_step(folder, 4), {}),
    "killed after an epoch's last batch": lambda folder: (*at_step(folder, 12), {}),
    "exception in an epoch": lambda folder: (SaveOnException(folder), {"fail_at": 9}, {}),
    "exception in the first step": lambda folder: (SaveOnException(folder), {"fail_at": 0}, {}),
    "exception in an epoch's first step": lambda folder: (SaveOnException(folder), {"fail_at": 12}, {}),
    "saved at the end of an epoch": lambda folder: (
        ModelCheckpoint(folder, save_on_train_epoch_end=True, filename="stop"), {}, {"max_epochs": 2}
    ),
    "saved after validation": lambda folder: (
        ModelCheckpoint(folder, save_on_train_epoch_end=False, filename="stop"), {}, {"max_epochs": 2}
    ),
    "saved after validation in an epoch": lambda folder: (
        ModelCheckpoint(folder, save_on_train_epoch_end=False, filename="stop"),
        {},
        {"max_steps": 9, "val_check_interval": 3},
    ),
    "stopped by max_steps": lambda folder: (
        ModelCheckpoint(folder, save_on_train_epoch_end=True, filename="stop"), {}, {"max_steps": 9}
    ),
}  # fmt: skip


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    ("num_workers", "asks_for_length", "length"),
    [
        (0, False, {"max_epochs": EPOCHS}),
        (0, True, {"max_epochs": EPOCHS}),
        (0, False, {"max_steps": EPOCHS * BATCHES}),
        pytest.param(2, False, {"max_epochs": EPOCHS}, marks=pytest.mark.slow),
        pytest.param(2, True, {"max_epochs": EPOCHS}, marks=pytest.mark.slow),
    ],
)
def test_resumed_run_sees_what_was_left(tmp_path, uninterrupted, stop, num_workers, asks_for_length, length):
    if stop == "stopped by max_steps" and "max_epochs" in length:
        length = {"max_steps": EPOCHS * BATCHES}  # Lightning counts the epoch that was cut as one
        asks_for_length = False
    callback, module_arguments, trainer_arguments = STOPS[stop](tmp_path)
    first = Recorder(**module_arguments)
    run = trainer([callback], **({"max_epochs": EPOCHS} | trainer_arguments))
    if module_arguments:
        with pytest.raises(RuntimeError, match="killed"):
            run.fit(first, datamodule=data(num_workers))
    else:
        run.fit(first, datamodule=data(num_workers))
    path = tmp_path / "stop.ckpt"
    done = torch.load(path, weights_only=True)["global_step"]
    second = Recorder(asks_for_length=asks_for_length)
    trainer(**length).fit(second, datamodule=data(num_workers), ckpt_path=path)
    assert first.seen[:done] + second.seen == uninterrupted


def test_a_run_may_be_resumed_twice_in_the_same_epoch(tmp_path, uninterrupted):
    seen, checkpoint = [], None
    for step in (8, 10):
        callback, arguments = at_step(tmp_path / str(step), step)
        module = Recorder(**arguments)
        with pytest.raises(RuntimeError, match="killed"):
            trainer([callback], max_epochs=EPOCHS).fit(module, datamodule=data(), ckpt_path=checkpoint)
        seen += module.seen
        checkpoint = tmp_path / str(step) / "stop.ckpt"
    module = Recorder()
    trainer(max_epochs=EPOCHS).fit(module, datamodule=data(), ckpt_path=checkpoint)
    assert seen + module.seen == uninterrupted


def test_the_same_data_module_starts_anew_with_another_trainer(tmp_path, uninterrupted):
    callback, arguments = at_step(tmp_path, 9)
    with pytest.raises(RuntimeError, match="killed"):
        trainer([callback], max_epochs=EPOCHS).fit(Recorder(**arguments), datamodule=data())
    used = data()
    trainer(max_epochs=EPOCHS).fit(Recorder(), datamodule=used, ckpt_path=tmp_path / "stop.ckpt")
    again = Recorder()
    trainer(max_epochs=EPOCHS).fit(again, datamodule=used)
    assert again.seen == uninterrupted


def test_a_trainer_that_goes_on_goes_on_in_the_order(uninterrupted):
    module, run, used = Recorder(), trainer(max_epochs=2), data()
    run.fit(module, datamodule=used)
    run.fit_loop.max_epochs = EPOCHS
    run.fit(module, datamodule=used)
    assert module.seen == uninterrupted


def test_reloading_the_loader_in_every_epoch_changes_nothing(uninterrupted):
    module = Recorder()
    trainer(max_epochs=EPOCHS, reload_dataloaders_every_n_epochs=1).fit(module, datamodule=data())
    assert module.seen == uninterrupted


def test_a_limited_epoch_takes_the_beginning_of_the_order_also_when_resumed(tmp_path, uninterrupted):
    expected = uninterrupted[0:4] + uninterrupted[6:10] + uninterrupted[12:16]
    callback, arguments = at_step(tmp_path, 6)
    first, second = Recorder(**arguments), Recorder()
    limits = {"max_epochs": EPOCHS, "limit_train_batches": 4}
    with pytest.raises(RuntimeError, match="killed"):
        trainer([callback], **limits).fit(first, datamodule=data())
    trainer(**limits).fit(second, datamodule=data(), ckpt_path=tmp_path / "stop.ckpt")
    assert first.seen + second.seen == expected


class EasyFirst(L.Callback):
    """Draws the first half of the samples only, from the second epoch on."""

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.datamodule.set_weights((torch.arange(SAMPLES) < SAMPLES // 2).float())


def test_weights_hold_for_the_next_epochs_and_survive_a_resume(tmp_path, uninterrupted):
    straight = Recorder()
    trainer([EasyFirst()], max_epochs=EPOCHS).fit(straight, datamodule=data())
    assert straight.seen[:BATCHES] == uninterrupted[:BATCHES]
    for epoch in (1, 2):
        drawn = list(itertools.chain(*straight.seen[epoch * BATCHES : (epoch + 1) * BATCHES]))
        assert sorted(drawn) == sorted(list(range(SAMPLES // 2)) * 2)
    callback, arguments = at_step(tmp_path, 8)
    first, second = Recorder(**arguments), Recorder()
    with pytest.raises(RuntimeError, match="killed"):
        trainer([EasyFirst(), callback], max_epochs=EPOCHS).fit(first, datamodule=data())
    trainer(max_epochs=EPOCHS).fit(second, datamodule=data(), ckpt_path=tmp_path / "stop.ckpt")
    assert first.seen + second.seen == straight.seen


def test_a_checkpoint_holds_no_data(tmp_path):
    callback, _ = at_step(tmp_path, 4)
    trainer([callback], max_epochs=1, limit_val_batches=0).fit(Recorder(), datamodule=data(validation=False))
    saved = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    assert saved["TensorDataModule"] == {"epoch": 0, "position": 16, "weights": None}


def test_the_global_random_numbers_are_those_of_a_run_without_loader():
    class Draws(Recorder):
        def on_train_epoch_end(self):
            self.seen.append(torch.rand(()).item())

    module = Draws()
    torch.manual_seed(7)
    trainer(max_epochs=2).fit(module, datamodule=data(num_workers=0))
    torch.manual_seed(7)
    assert [value for value in module.seen if isinstance(value, float)] == [torch.rand(()).item() for _ in range(2)]
