"""A training that may be killed in the middle of an epoch, and resumed. Run by test_resume.py."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import KD
from lightning_distill.callbacks import TemperatureAnnealing
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import FeatureMatching


class Kill(L.Callback):
    """SIGKILL after an optimizer step: no process can clean up."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))


def main(folder, devices, workers, kill_at):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 4, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    L.seed_everything(3, verbose=False)
    module = KD(
        network(8, 1),
        network(16, 2),
        terms={"hint": FeatureMatching({"0": "0", "2": "2"}, weights=[0.0, 0.1])},
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3),
    )
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=2, save_top_k=0, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        callbacks=[TemperatureAnnealing(8.0), checkpoints, Kill(kill_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    data = TensorDataModule((x, y), batch_size=8 // devices, num_workers=workers, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    torch.save(
        {"student": module.student.state_dict(), "temperature": module.temperature, "steps": trainer.global_step},
        folder / f"final-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
