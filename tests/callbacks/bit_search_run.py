"""A training with a bit search in the middle, in two processes; run by test_bit_search.py."""

import sys
from pathlib import Path

import lightning as L
import torch

from lightning_distill import KD, QADModule
from lightning_distill.callbacks import BitSearch
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec


def data(batch_size=8):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=generator), torch.randint(0, 4, (48,), generator=generator)
    return TensorDataModule((x, y), (x, y), batch_size=batch_size, eval_batch_size=16, seed=1)


def module():
    torch.manual_seed(3)
    return KD(MLP((6, 8, 8, 4)), MLP((6, 12, 4)), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))


def quantized_module():
    torch.manual_seed(3)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    return QADModule(MLP((6, 8, 8, 4)), spec=QuantSpec(weights=8, activations=8), optimizer=sgd)


def search(folder, **more):
    return BitSearch(**({"effective_bits": 4.0, "samples": 32, "start_step": 4, "folder": str(folder)} | more))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    callback, trained = search(folder / "plan"), quantized_module()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
    )
    trainer.fit(trained, datamodule=data(4))
    result = callback.result.as_dict()
    torch.save({"result": result, "student": trained.student.state_dict()}, folder / f"rank-{trainer.global_rank}.pt")
