"""A small pipeline: networks, data, stages."""

from functools import partial

import torch
from torch import nn

from lightning_distill import KD, Experiment, Pipeline, ProgressiveStage, Stage
from lightning_distill.datamodules import TensorDataModule


def net(width, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3))


def data(items=120):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(items, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(-1)
    third = items // 3
    return TensorDataModule(
        (x[:third], y[:third]), (x[third:-third], y[third:-third]), (x[-third:], y[-third:]), batch_size=8
    )


SGD = partial(torch.optim.SGD, lr=0.2)
CPU = {"accelerator": "cpu", "enable_progress_bar": False, "max_epochs": 2}


def experiment(module, **trainer):
    return Experiment(module, data(), CPU | trainer)


def teacher(**trainer):
    return Stage("teacher", lambda earlier: experiment(KD(net(16), alpha=1.0, optimizer=SGD), **trainer))


def student(name, width=8, transfer="direct", alpha=0.3, trainer=None, **options):
    def build(earlier):
        module = ProgressiveStage(net(width), transfer, alpha=alpha, optimizer=SGD, **options)
        return experiment(module, **(trainer or {}))

    return Stage(name, build)


def chain(**trainer):
    return Pipeline([teacher(**trainer), student("assistant", 8, trainer=trainer), student("last", 4, trainer=trainer)])
