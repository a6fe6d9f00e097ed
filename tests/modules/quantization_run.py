"""A quantization-aware distillation that may be killed and resumed, in one process or two. Run by test_qad.py."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import QADModule
from lightning_distill.callbacks import AlternatingQuantization, QuantizationRamp
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.quantization import QuantSpec, quantized_layers, set_bits


class Kill(L.Callback):
    """SIGKILL after an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Plan(L.Callback):
    """Other bits in the middle of the training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            set_bits(pl_module.student, {"0": 2, "4": 32})


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def main(folder, devices, kill_at):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 4, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    L.seed_everything(3, verbose=False)
    module = QADModule(
        network(),
        spec=QuantSpec(4, 8),
        alpha=0.2,
        quant_weight=0.01,
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
    )
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=2, save_top_k=0, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        callbacks=[QuantizationRamp(), AlternatingQuantization(3, 2), Plan(), checkpoints, Kill(kill_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    data = TensorDataModule((x, y), batch_size=8 // devices, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    bits = [layer.weight_bits for layer in quantized_layers(module.student).values()]
    torch.save(
        {"student": module.student.state_dict(), "bits": bits, "steps": trainer.global_step},
        folder / f"final-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
