"""A training whose teacher is the student's own past; may be killed, and resumed. Run by test_self_distillation.py."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import KD, BornAgain
from lightning_distill.callbacks import MeanTeacher, SnapshotTeacher, SoftLabelRefinement
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.modules import Generation

EPOCHS = 3
STEPS = 10  # an epoch


class Kill(L.Callback):
    """SIGKILL before an optimizer step: no process can clean up."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def network(width=8, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))


def jitter(batch):
    return (batch[0] + 0.1 * torch.randn_like(batch[0]), *batch[1:])


def method(name):
    """Module and callbacks."""
    shared = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS),
        "lr_interval": "step",
    }
    if name.startswith("born_again"):
        settings = [Generation(), Generation(label_smoothing=0.1, batch_transform=jitter), Generation(seed=7)]
        monitor = "val/accuracy" if name == "born_again_best" else None
        module = BornAgain(
            network(), generations=3, taught_by="ensemble", monitor=monitor, per_generation=settings, **shared
        )
        return module, []
    if name == "mean_teacher":
        return KD(network(), alpha=0.5, **shared), [MeanTeacher(momentum=0.9)]
    if name == "snapshots":
        return KD(network(), alpha=0.5, **shared), [SnapshotTeacher(size=2)]
    return KD(network(), alpha=1.0, **shared), [SoftLabelRefinement(0.8)]


def state_of(module):
    """Everything that must be the same after a resume."""
    teacher = module.teacher
    state = {"module": module.state_dict(), "generation": getattr(module, "generation", None)}
    if hasattr(teacher, "previous"):
        state["previous"] = teacher.previous
    return state


def main(folder, name, devices, kill_at):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 4, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    y[:20] = -100
    L.seed_everything(3, verbose=False)
    module, callbacks = method(name)
    # With a best validation to keep, never in a step that a validation follows: Lightning would leave it out.
    every = 4 if name == "born_again_best" else 2
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=every, save_top_k=0, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=EPOCHS,
        callbacks=[*callbacks, checkpoints, Kill(kill_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        val_check_interval=0.5,
        num_sanity_val_steps=0,
    )
    last = folder / "last.ckpt"
    data = TensorDataModule((x, y), (x[20:], y[20:]), batch_size=8 // devices, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    torch.save(state_of(module) | {"steps": trainer.global_step}, folder / f"final-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]))
