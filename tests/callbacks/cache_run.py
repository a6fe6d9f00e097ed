"""Cache a teacher with several processes, or until killed. Run by test_cache_writer.py."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn

from lightning_distill.callbacks import CacheWriter
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.modules import TeacherPrediction


class Kill(L.Callback):
    """SIGKILL before a batch: no process can clean up."""

    def __init__(self, batch):
        self.batch = batch

    def on_predict_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


class Counting(nn.Sequential):
    """Knows how many samples it has seen."""

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return super().forward(x)


def teacher():
    torch.manual_seed(2)
    return Counting(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def data(items=50, **options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(items, 4, generator=generator), torch.randint(0, 3, (items,), generator=generator)
    return TensorDataModule((x, y), **{"batch_size": 10, "eval_batch_size": 4} | options)


def write(folder, *callbacks, module=None, datamodule=None, network=None, task=None, trainer=None, **options):
    """Write a cache; returns the teacher."""
    network = network or teacher()
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    writer = CacheWriter(folder, **{"kind": "dense"} | options)
    runner = L.Trainer(**quiet | (trainer or {}), callbacks=[writer, *callbacks], default_root_dir=folder.parent)
    module = module or TeacherPrediction(network, task)
    runner.predict(module, datamodule=datamodule or data(), return_predictions=False)
    return network


if __name__ == "__main__":
    target, devices, kill_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    trainer = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    network = write(target, Kill(kill_at), trainer=trainer, shard_minutes=0.0)
    print(f"seen {network.seen}")
