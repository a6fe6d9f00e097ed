"""Trainings with the rules and callbacks that adapt to the student. Run by test_adaptation.py."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_distill import KD
from lightning_distill.callbacks import GradientAlignment, GradientVarianceTemperature, LogSelection, TaskDifficulty
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.selection import SelectByClass, SelectByRunningPercentile, SelectByVariance

CASES = {
    "percentile": (lambda: [LogSelection()], lambda: {"soft": SelectByRunningPercentile(50.0)}),
    "class": (lambda: [LogSelection()], lambda: {"soft": SelectByClass(3, 50.0, min_count=2)}),
    "variance": (lambda: [LogSelection()], lambda: {"*": SelectByVariance(0.9, 2.0)}),
    "gradient variance": (lambda: [GradientVarianceTemperature(momentum=0.5, micro_batches=6)], dict),
    "alignment": (lambda: [GradientAlignment(every_n_steps=2)], dict),
    "accuracy gap": (lambda: [TaskDifficulty(beta=2.0)], dict),
    "gap of a term": (lambda: [TaskDifficulty(term="soft", momentum=0.5)], dict),
}


class Record(L.Callback):
    """What the knobs were before each optimizer step; kills the process at one of them."""

    def __init__(self, kill_at):
        self.kill_at = kill_at
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        factors = [c.factor for c in trainer.callbacks if isinstance(c, GradientAlignment)]
        weights = pl_module.weighting.weights()
        rules = [float(value.sum()) for value in pl_module.item_rules.state_dict().values()]
        self.seen.append([trainer.global_step, pl_module.temperature, *weights.values(), *factors, *rules])

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state_dict):
        self.seen = state_dict["seen"]


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def run(case, folder, *, devices=1, batch_size=16, accumulate=1, kill_at=-1, precision="32-true"):
    """Train and return what was recorded, the student's weights, and the reports."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 4, generator=generator)
    y = network(16, 2)(x).argmax(-1)
    y[::6] = torch.randint(0, 3, (16,), generator=generator)  # the teacher is right most of the time
    L.seed_everything(3, verbose=False)
    callbacks, rules = (make() for make in CASES[case])
    module = KD(
        network(8, 1),
        network(16, 2),
        item_weights=rules,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8),
        weights={"soft": 0.7},  # two terms, not a fused one
    )
    record = Record(kill_at)
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=1, save_top_k=0, save_last=True, enable_version_counter=False
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        precision=precision,
        accumulate_grad_batches=accumulate,
        max_epochs=3,
        num_sanity_val_steps=1,
        callbacks=[*callbacks, checkpoints, record],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = Path(folder) / "last.ckpt"
    data = TensorDataModule((x, y), (x[:32], y[:32]), batch_size=batch_size, seed=5)
    trainer.fit(module, datamodule=data, ckpt_path=last if last.exists() else None)
    reports = [callback.reports for callback in callbacks if isinstance(callback, LogSelection)]
    return {
        "seen": record.seen,
        "student": nn.utils.parameters_to_vector(module.student.parameters()).detach(),
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
        "fractions": [report.fraction for report in (reports[0] if reports else {}).values()],
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    found = {case: run(case, target / case.replace(" ", "-"), devices=2, batch_size=8) for case in CASES}
    torch.save(found, target / f"found-{torch.distributed.get_rank()}.pt")
