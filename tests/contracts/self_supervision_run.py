"""Deep supervision, or stochastic depth, that may be killed and resumed. Run by test_self_supervision.py."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import DeepSupervision, StochasticDepthSelfKD
from lightning_distill.callbacks import PerformanceHeadWeights
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import AuxiliaryHeads
from lightning_distill.weighting import LinearDecay


class Kill(L.Callback):
    """SIGKILL after an optimizer step: no process can clean up."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())

    def forward(self, x):
        return x + self.inner(x)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), Residual(), Residual(), Residual(), nn.Linear(8, 3))


def module_of(kind):
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)  # noqa: E731
    if kind == "depth":
        return StochasticDepthSelfKD(network(), ["1", "2", "3"], mode="batch", optimizer=optimizer), []
    heads = AuxiliaryHeads(["1", "2"], weights=0.5, schedule=LinearDecay(0.8), dropout=0.3)
    return DeepSupervision(network(), heads, alignment=0.1, optimizer=optimizer), [PerformanceHeadWeights()]


def main(folder, kind, devices, kill_at):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 4, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    L.seed_everything(3, verbose=False)
    module, callbacks = module_of(kind)
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=2, save_top_k=0, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        callbacks=[*callbacks, checkpoints, Kill(kill_at)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    data = TensorDataModule((x, y), (x, y), batch_size=8 // devices, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    tensors = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    weights = module.heads.weights if kind == "heads" else None
    torch.save({"tensors": tensors, "weights": weights}, folder / f"final-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]))
