"""A training with dynamic layer weights, in one process or two; run by test_layer_matching.py."""

import sys
from pathlib import Path

import lightning as L
import torch

from lightning_distill import KD
from lightning_distill.callbacks import DynamicLayerWeights, RandomLayers
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import FeatureMatching
from lightning_distill.networks import MLP

PAIRS = {f"blocks.{i}": f"blocks.{i}" for i in range(3)}


def data(batch_size):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=generator), torch.randint(0, 4, (48,), generator=generator)
    y[:10] = -100
    return TensorDataModule((x, y), (x, y), batch_size=batch_size, eval_batch_size=16, seed=1)


def run(folder, devices, batch_size, accumulate=1, callbacks=None, **trainer):
    """The trained student, the callbacks and the Trainer."""
    torch.manual_seed(3)
    student, teacher = MLP((6, 8, 8, 8, 4)), MLP((6, 12, 12, 12, 4))
    module = KD(
        student,
        teacher,
        terms={"features": FeatureMatching(PAIRS)},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    callbacks = [DynamicLayerWeights(eta=2.0, floor=0.1)] if callbacks is None else callbacks
    trainer = L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "accumulate_grad_batches": accumulate,
            "max_epochs": 2,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": callbacks,
        }
        | trainer
    )
    torch.manual_seed(4)
    trainer.fit(module, datamodule=data(batch_size))
    return module, callbacks, trainer


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    module, callbacks, _ = run(folder, 2, 8)
    random, _, _ = run(folder, 2, 8, callbacks=[RandomLayers(2, seed=5)])
    found = {
        "weights": callbacks[0].weights,
        "student": module.student.state_dict(),
        "random": random.student.state_dict(),
    }
    torch.save(found, folder / f"found-{torch.distributed.get_rank()}.pt")
