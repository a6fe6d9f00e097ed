"""Trainings of compressed students, which may be killed in the middle. Run by test_compressed.py.

``compressed_run.py FOLDER DEVICES KILL_AT KIND...``, each kind as ``pruned-mlp``, with ``@2`` for two micro-batches.
"""

import copy
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model

from lightning_distill import KD, QADModule
from lightning_distill.callbacks import BlockSparsity
from lightning_distill.compression import factorize, prune_channels
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.networks import MLP, ResNet1d
from lightning_distill.quantization import QuantSpec, calibrate, prepare
from lightning_distill.recovery import recovered
from tests.contracts.resume_run import Kill


class KillLate(Kill):
    """SIGKILL before the last micro-batch of an optimizer step."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)


COMPRESSIONS = ("pruned", "low_rank", "recovered", "sparse", "adapter")
NETWORKS = {"mlp": (partial(MLP, (40, 24, 24, 5)), (40,)), "resnet": (partial(ResNet1d, (8, 8), classes=5), (1, 40))}


def trained(make, batches):
    """A network that has learnt a little, so that its channels and its singular values differ."""
    torch.manual_seed(1)
    network = make()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for x, y, *_ in batches:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network


def data_of(shape, batch_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, *shape, generator=generator)
    y = (x.flatten(1) @ torch.randn(40, 5, generator=generator)).argmax(1)
    return TensorDataModule((x[:80], y[:80]), (x[80:], y[80:]), batch_size=batch_size, seed=5)


def student_of(compression, network, data):
    """The student, and what was chosen for it from weights and data."""
    batches = list(data.train_dataloader())
    if compression == "pruned":
        report = prune_channels(network, batches[0], keep=0.5, width=4, importance="taylor", batches=batches)
        return network, [(layer.name, layer.kept) for layer in report.layers]
    if compression == "low_rank":
        report = factorize(network, parameters=0.6, batches=batches)
        return network, [(layer.name, layer.rank) for layer in report.layers]
    if compression == "adapter":  # beside factors that stay as they are
        report = factorize(network, parameters=0.6)
        names = [f"{layer.name}.1" for layer in report.layers if layer.rank is not None]
        adapted = get_peft_model(network, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        return adapted, [(layer.name, layer.rank) for layer in report.layers]
    prepare(network, QuantSpec(weights=3, activations=8))
    if compression == "sparse":
        return network, []
    calibrate(network, [batch[0] for batch in batches])
    best = recovered(network, data, metric="nll", mode="min")
    old = network.state_dict()
    return best, [name for name, value in best.state_dict().items() if not torch.equal(value, old[name])]


def run(kind, folder, devices, kill_at):
    name, _, accumulate = kind.partition("@")
    compression, _, network = name.partition("-")
    make, shape = NETWORKS[network]
    parts = devices * int(accumulate or 1)
    data = data_of(shape, 8)
    data.setup("fit")
    teacher = trained(make, data.train_dataloader())
    L.seed_everything(3, verbose=False)
    student, chosen = student_of(compression, copy.deepcopy(teacher), data)
    before = copy.deepcopy(student.state_dict())
    kind_of = QADModule if compression in ("recovered", "sparse") else KD
    module = kind_of(student, teacher, optimizer=partial(torch.optim.AdamW, lr=0.003))
    checkpoints = ModelCheckpoint(
        folder, every_n_train_steps=2, save_top_k=0, save_last=True, enable_version_counter=False
    )
    callbacks = [checkpoints, KillLate(kill_at)]
    blocks = BlockSparsity(0.5, (4, 4), skip=["head"], start_step=2, end_step=10, every=2)
    if compression == "sparse":
        callbacks.append(blocks)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=2,
        limit_val_batches=0,
        accumulate_grad_batches=int(accumulate or 1),
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, datamodule=data_of(shape, 8 // parts), ckpt_path=last if last.exists() else None)
    module.export(folder / "student.safetensors", overwrite=True)
    final = {
        "chosen": chosen,
        "before": before,
        "after": module.student.state_dict(),
        "kept": blocks.kept,
        "steps": trainer.global_step,
    }
    torch.save(final, folder / f"final-{trainer.global_rank}.pt")


if __name__ == "__main__":
    target, number, kill = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    for asked in sys.argv[4:]:
        where = target / asked
        where.mkdir(parents=True, exist_ok=True)
        run(asked, where, number, kill)
