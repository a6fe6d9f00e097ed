"""A training that publishes its student, or one, with two processes, that follows it. Run by test_follow.py."""

import json
import sys
import time
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import PublishStudent
from lightning_distill.teachers import FollowedTeacher


class Slow(L.Callback):
    """The first version is there before the readers are, the others are not."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.05)
        while trainer.global_step == 4 and not (self.folder / "reading").exists():
            time.sleep(0.1)


class Watch(L.Callback):
    def __init__(self, folder):
        self.folder, self.steps = folder, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (self.folder / "reading").touch()
        self.steps.append(module.teacher.version.step)

    def on_train_end(self, trainer, module):
        (self.folder / f"versions-{trainer.global_rank}.json").write_text(json.dumps(self.steps))


def main(folder, what):
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    reads = what == "read"
    teacher = FollowedTeacher(str(folder / "out"), nn.Linear(8, 3), check_every=2, max_age=6) if reads else None
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2 if reads else 1,
        strategy="ddp" if reads else "auto",
        max_epochs=4,
        callbacks=[Watch(folder)] if reads else [PublishStudent(str(folder / "out"), every_n_steps=2), Slow(folder)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    module = KD(nn.Linear(8, 3), teacher, alpha=0.5 if reads else 1.0)
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=4))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
