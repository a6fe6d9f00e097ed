"""A training that takes blocks and may be killed and resumed, in one process or two. Run by test_block_sparsity.py."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_distill import KD
from lightning_distill.callbacks import BlockSparsity
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.networks import MLP


class Kill(L.Callback):
    """SIGKILL before an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder, devices, kill_at):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(76, 6, generator=generator), torch.randint(0, 4, (76,), generator=generator)
    L.seed_everything(3, verbose=False)
    torch.manual_seed(1)
    module = KD(MLP((6, 12, 12, 4)), MLP((6, 8, 4)), optimizer=partial(torch.optim.AdamW, lr=0.01))
    blocks = BlockSparsity(0.6, (3, 2), skip=["head"], start_step=2, end_step=22, every=4, scope="global")
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=3, save_top_k=0, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        limit_val_batches=0,
        callbacks=[checkpoints, blocks, Kill(kill_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    data = TensorDataModule((x, y), batch_size=8 // devices, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    torch.save(
        {"student": module.student.state_dict(), "kept": blocks.kept, "steps": trainer.global_step},
        folder / f"final-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
