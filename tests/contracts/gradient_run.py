"""One optimizer step over 32 items, split in several ways. Run by test_gradient.py, by itself with two processes."""

import sys
from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.losses import FeatureMatching
from lightning_distill.tasks import Classification

KINDS = ("samples", "tokens", "features")


class Tokens(Classification):
    """Sequences of tokens, of which some are padding: an item is a token."""

    def mask(self, batch, outputs):
        return batch[0][..., 0] > -0.5


def network(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))


def data(kind):
    generator = torch.Generator().manual_seed(0)
    shape = (32, 5) if kind == "tokens" else (32,)
    x = torch.randn(*shape, 4, generator=generator)
    y = torch.randint(0, 3, shape, generator=generator)
    y[:11] = -100  # unlabelled: whole micro-batches of them
    if kind == "tokens":
        x[20:, 2:, 0] = -1.0  # masked: far fewer tokens in some micro-batches
    return TensorDataset(x, y)


def gradient(kind, devices, batch_size, accumulate, folder):
    """What a step of ``devices`` processes changed, at learning rate 1."""
    student = network(8, 1)
    before = nn.utils.parameters_to_vector(student.parameters()).detach().clone()
    module = KD(
        student,
        network(16, 2),
        task=Tokens() if kind == "tokens" else Classification(),
        terms={"hint": FeatureMatching({"0": "0", "1": "1"}, weights=[1.0, 0.0])} if kind == "features" else None,
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
    )
    torch.manual_seed(3)
    module.build((torch.zeros(2, 4),))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        accumulate_grad_batches=accumulate,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(data(kind), batch_size=batch_size))
    assert trainer.global_step == 1
    return before - nn.utils.parameters_to_vector(student.parameters()).detach()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    splits = [tuple(map(int, split.split("x"))) for split in sys.argv[2:]]
    found = {(kind, *split): gradient(kind, 2, *split, target) for kind in KINDS for split in splits}
    torch.save(found, target / f"gradients-{torch.distributed.get_rank()}.pt")
