"""A small problem and a method for it."""

import random

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill.comparison import Experiment

METRICS = ("test/accuracy", "test/nll")


class Blobs(L.LightningDataModule):
    """Four overlapping Gaussian blobs in the plane; shuffled by the global random numbers, as plain loaders do."""

    def __init__(self, batch_size=16):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage):
        generator = torch.Generator().manual_seed(1)
        labels = torch.arange(320) % 4
        centers = 1.5 * torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
        points = centers[labels] + torch.randn(320, 2, generator=generator)
        order = torch.randperm(320, generator=generator)
        self.train, self.val, self.test = (
            TensorDataset(points[part], labels[part]) for part in order.split([64, 96, 160])
        )

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, 96)

    def test_dataloader(self):
        return DataLoader(self.test, 160)


class Classifier(L.LightningModule):
    """Draws random numbers of every kind: order of the data, dropout, augmentation; its scheduler counts epochs."""

    def __init__(self, width, label_smoothing=0.0):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 4))
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x + 0.1 * np.random.standard_normal() + random.gauss(0, 0.1)  # noqa: NPY002
        loss = self.loss(self.student(x), y)
        self.log("train/loss", loss)
        return loss

    def _evaluate(self, stage, batch):
        x, y = batch
        logits = self.student(x)
        self.log(f"{stage}/accuracy", (logits.argmax(-1) == y).float().mean())
        self.log(f"{stage}/nll", nn.functional.cross_entropy(logits, y))

    def validation_step(self, batch, batch_idx):
        self._evaluate("val", batch)

    def test_step(self, batch, batch_idx):
        self._evaluate("test", batch)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.student.parameters(), lr=0.3, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def method(width=4, label_smoothing=0.0, callbacks=None, max_epochs=3, module=Classifier):
    def make(seed):
        trainer = {"max_epochs": max_epochs, "accelerator": "cpu", "callbacks": [make() for make in callbacks or ()]}
        return Experiment(module(width, label_smoothing), Blobs(), trainer)

    return make


class StopAt(L.Callback):
    """Raises once, in the middle of an epoch."""

    def __init__(self, error, epoch):
        self.error = error
        self.epoch = epoch
        self.done = False

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1 and not self.done:
            self.done = True
            raise self.error


class CountEpochs(L.Callback):
    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch)


def measured(comparison):
    """What the trainings determine, without their times."""
    return {(run["method"], run["seed"]): {name: run[name] for name in METRICS} for run in comparison.runs}
