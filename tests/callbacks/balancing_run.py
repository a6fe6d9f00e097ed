"""Trainings with every callback that balances terms. Run by test_balancing.py, and by itself with two processes."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.callbacks import (
    MGDA,
    BalancedMagnitudes,
    CAGrad,
    GradNorm,
    PCGrad,
    ScheduledWeights,
    UncertaintyWeighting,
)
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import FeatureMatching
from lightning_distill.tasks import Classification
from lightning_distill.weighting import StagedWeight

CALLBACKS = {
    "GradNorm": lambda: GradNorm(every_n_steps=2),
    "GradNorm at once": lambda: GradNorm(lr=None, every_n_steps=1, alpha=0.5),
    "UncertaintyWeighting": lambda: UncertaintyWeighting(learning_rate=0.1),
    "MGDA": MGDA,
    "MGDA, exact": lambda: MGDA(exact=True, normalise="loss"),
    "PCGrad": PCGrad,
    "CAGrad": lambda: CAGrad(exact=True),
    "BalancedMagnitudes": lambda: BalancedMagnitudes(decay=0.5, every_n_steps=1),
    "ScheduledWeights": lambda: ScheduledWeights({"soft": StagedWeight(warm_up=4)}),
}
PER_MICRO_BATCH = ("MGDA", "MGDA, exact", "PCGrad", "CAGrad")  # their weights belong to a micro-batch


class Sequences(Classification):
    """An item is a token; some are padding."""

    def mask(self, batch, outputs):
        return batch[0][..., 0] > -0.5

    def positions(self, batch):
        return batch[0][..., 0] > -0.5


class Features(FeatureMatching):
    """A value per token."""

    def forward(self, step):
        student, teacher = step.student.features["3"], step.teacher.features["3"]
        return (self.transforms[0](student) - teacher).square().mean(-1)


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


@torch.no_grad()
def dataset():
    """96 sequences of 5 tokens, some unlabelled, some padding: parts of a step have unlike numbers of items.

    The labels are what the teacher believes least, so that the terms are in conflict.
    """
    x = torch.randn(96, 5, 4, generator=torch.Generator().manual_seed(0))
    y = network(16, 2)(x).argmin(-1)
    y[:11] = -100
    x[20:30, 2:, 0] = -1.0
    x[70:, 3:, 0] = -1.0
    return TensorDataset(x, y)


def build(**arguments):
    module = KD(
        network(8, 1),
        network(16, 2),
        task=Sequences(),
        terms={"feature": Features({"3": "3"})},
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        **arguments,
    )
    torch.manual_seed(3)
    module.build(next(iter(DataLoader(dataset(), batch_size=4))))
    return module


def parts(batch_size, accumulate):
    """Indices of this process's batches, such that a step has the same items whatever the number of processes."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    own = batch_size * accumulate  # of this process in a step
    world = 32 // own
    starts = [32 * step + own * rank + batch_size * micro for step in range(3) for micro in range(accumulate)]
    assert world in (1, 2)
    return [list(range(start, start + batch_size)) for start in starts]


class History(L.Callback):
    """The weights after every optimizer step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.weights):
            values = {name: float(value) for name, value in pl_module.weighting.weights().items()}
            self.weights.append([values[name] for name in ("hard", "soft", "feature")])


def train(
    name,
    folder,
    *,
    devices=1,
    batch_size=32,
    accumulate=1,
    module=None,
    callbacks=(),
    data=None,
    ckpt_path=None,
    **trainer,
):
    """Weights after each step, and the student's weights at the end."""
    module = build() if module is None else module
    history = History()
    balance = [CALLBACKS[name]()] if name else []
    settings = {"max_epochs": 2, "enable_checkpointing": False} | trainer
    fitting = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        callbacks=[*balance, history, *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        **settings,
    )
    if data is None:
        fitting.fit(module, DataLoader(dataset(), batch_sampler=parts(batch_size, accumulate)), ckpt_path=ckpt_path)
    else:
        fitting.fit(module, datamodule=data, ckpt_path=ckpt_path)
    student = nn.utils.parameters_to_vector(module.student.parameters()).detach().clone()
    return torch.tensor(history.weights, dtype=torch.float64), student


def samples():
    """The first token of each sequence; the module's order is its own, and it knows where a run was stopped."""
    x, y = dataset().tensors
    return TensorDataModule((x[:, 0], y[:, 0]), batch_size=16, seed=5)


class Kill(L.Callback):
    """SIGKILL after an optimizer step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed(name, folder, kill_at):
    """A run on two processes that saves every second step; continued if there is something to continue."""
    last = folder / "last.ckpt"
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=0, save_last=True, enable_version_counter=False)
    return train(
        name,
        folder,
        devices=2,
        data=samples(),
        callbacks=[saving, Kill(kill_at)],
        ckpt_path=last if last.exists() else None,
        enable_checkpointing=True,
        max_epochs=3,
    )


if __name__ == "__main__":
    target, what = Path(sys.argv[1]), sys.argv[2]
    if what == "splits":
        found = {name: train(name, target, devices=2, batch_size=16) for name in CALLBACKS}
        invariant = [name for name in CALLBACKS if name not in PER_MICRO_BATCH]
        found |= {f"{name}/2": train(name, target, devices=2, batch_size=8, accumulate=2) for name in invariant}
    else:
        found = {what: killed(what, target, int(sys.argv[3]))}
    torch.save(found, target / f"found-{os.environ.get('LOCAL_RANK', '0')}.pt")
