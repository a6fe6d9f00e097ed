"""A problem that trains in a moment, and a search on it that may be killed. Run by test_search_killed.py."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill.comparison import Experiment
from lightning_distill.search import search

STABLE = {"lr": {"low": 0.01, "high": 0.3, "log": True}, "momentum": {"low": 0.0, "high": 0.5}}
SPACE = {"lr": {"low": 0.01, "high": 10.0, "log": True}, "momentum": {"low": 0.0, "high": 0.9}}


class Line(L.LightningModule):
    """Fits a line; ``val/loss`` depends on the settings, ``val/accuracy`` is a made-up second metric."""

    def __init__(self, lr, momentum, shift=0.0):
        super().__init__()
        self.student = nn.Linear(3, 1)
        self.lr, self.momentum, self.shift = lr, momentum, shift

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = (self.student(x) - y).square().mean()
        if not loss.isfinite():
            raise FloatingPointError(f"A loss is not finite: loss = {loss.item()}.")
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/loss", (self.student(x) - y).square().mean() + self.shift)
        self.log("val/accuracy", 1 / (1 + self.lr + self.momentum))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 3, generator=generator)
    y = x @ torch.tensor([[1.0], [2.0], [-1.0]]) + 0.1 * torch.randn(32, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader()


class Kill(L.Callback):
    """SIGKILL in the middle of the third epoch, unless it was done before."""

    def __init__(self, marker):
        self.marker = marker

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Log(L.Callback):
    """One line per epoch that was trained, by any process."""

    def __init__(self, path, settings):
        self.path, self.settings = path, settings

    def on_train_epoch_end(self, trainer, pl_module):
        with self.path.open("a") as file:
            file.write(json.dumps({"epoch": trainer.current_epoch, **self.settings}) + "\n")


def build(settings, seed, *, callbacks=(), epochs=4, pause=0.0, **trainer):
    class Slow(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            time.sleep(pause)

    arguments = {"max_epochs": epochs, "accelerator": "cpu", "callbacks": [*callbacks, Slow()], **trainer}
    return Experiment(Line(**settings), Data(), arguments)


def found(result):
    """What a search determines, without its times."""
    return [(t.number, t.state, t.settings, t.values) for t in result.trials]


if __name__ == "__main__":
    folder, kill_at, pause, trials = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    count = 0

    def counted(settings, seed):
        global count
        count += 1
        killer = [Kill(folder / "killed")] if count == kill_at else []
        return build(settings, seed, callbacks=[*killer, Log(folder / "epochs.jsonl", settings)], pause=pause)

    folder.mkdir(parents=True, exist_ok=True)
    search(
        counted,
        STABLE,
        folder=folder / "search",
        metric="val/loss",
        mode="min",
        trials=trials,
        console=Console(quiet=True),
    )
