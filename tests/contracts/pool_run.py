"""A training from a pool of teachers that may be killed in the middle of an epoch. Run by test_pool.py."""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import KD
from lightning_distill.callbacks import AdaptToCapability, PoolLog
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.teachers import (
    CachedChoice,
    CostAwareChoice,
    DifficultyChoice,
    PoolMember,
    RouterLoss,
    TeacherPool,
    TeacherRouter,
)
from tests.contracts.resume_run import Kill


def choice_of(kind):
    if kind == "router":
        torch.manual_seed(9)
        return TeacherRouter(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), top_k=2, noise=0.5)
    if kind == "cached":  # drawn, and drawn again in the third epoch
        return CachedChoice(CostAwareChoice("sampled", tau=1.0, epsilon=0.2), max_uses=2)
    return DifficultyChoice((0.5, 0.6))


def callbacks_of(kind):
    if kind == "difficulty":
        return [AdaptToCapability(alpha=1.0)]
    return [PoolLog()] if kind == "log" else []


def members():
    for place in range(3):
        torch.manual_seed(place)
        yield PoolMember(f"t{place}", nn.Linear(4, 3), cost=place + 1.0, accuracy=0.6 + 0.1 * place)


def main(folder, kind, devices, kill_at):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(80, 4, generator=generator), torch.randint(0, 3, (80,), generator=generator)
    L.seed_everything(3, verbose=False)
    module = KD(
        nn.Linear(4, 3),
        TeacherPool(list(members()), choice_of(kind)),
        terms={"router": RouterLoss(0.1)} if kind == "router" else {},
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.05),
    )
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=2, save_top_k=0, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=3,
        log_every_n_steps=10,
        callbacks=[checkpoints, Kill(kill_at), *callbacks_of(kind)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    data = TensorDataModule((x, y), (x[:40], y[:40]), batch_size=8 // devices, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    choice = module.teacher.choice
    torch.save(
        {
            "student": module.student.state_dict(),
            "choice": choice.get_extra_state() if kind == "cached" else dict(choice.named_parameters()),
            "thresholds": getattr(choice, "thresholds", None),
            "steps": trainer.global_step,
            "log": {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("pool/")},
        },
        folder / f"final-{trainer.global_rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:5]))
