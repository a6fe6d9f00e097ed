"""A training with a curriculum, alone or in two processes, that may be killed. Run by test_curriculum.py."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import KD
from lightning_distill.callbacks import CurriculumResampling
from lightning_distill.curriculum import SigmoidCurriculum
from lightning_distill.datamodules import TensorDataModule


class Kill(L.Callback):
    """SIGKILL before an optimizer step: no process can clean up."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Seen(L.Callback):
    """Keeps the samples of each batch."""

    def __init__(self):
        self.index = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.index.append(batch[2].tolist())


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.3), nn.Linear(width, 3))


def main(folder, devices, workers, kill_at, refresh):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 4, generator=generator), torch.randint(0, 3, (48,), generator=generator)
    L.seed_everything(3, verbose=False)
    module = KD(network(8, 1), network(16, 2), optimizer=lambda p: torch.optim.AdamW(p, lr=0.05))
    curriculum = CurriculumResampling(
        SigmoidCurriculum(width=0.05), difficulty="divergence" if refresh else "entropy", refresh_every=refresh or None
    )
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=2, save_top_k=0, save_last=True, enable_version_counter=False
    )
    seen = Seen()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=4,
        callbacks=[curriculum, seen, checkpoints, Kill(kill_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    data = TensorDataModule((x, y), batch_size=8 // devices, num_workers=workers, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    torch.save(
        {
            "student": module.student.state_dict(),
            "difficulty": curriculum.difficulty,
            "history": curriculum.history,
            "seen": seen.index,
        },
        folder / f"final-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:6]))
