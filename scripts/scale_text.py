"""Distil a language model on as many devices as there are, by the strategy that is named.

    python scripts/scale_text.py --strategy ddp --devices 2                     # one machine: Lightning starts the rest
    torchrun --nproc-per-node 8 scripts/scale_text.py --strategy fsdp2 --devices 8
    sbatch scripts/launch/fsdp2.slurm                                           # several machines

Student and teacher are Hugging Face names or folders; without them a small random pair shows that a set-up works.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from lightning_distill import KD
from lightning_distill.datamodules import TextDataModule
from lightning_distill.networks import from_config
from lightning_distill.tasks import CausalLM
from lightning_distill.teachers import FrozenTeacher


def main() -> None:
    """Train, and export the student."""
    options = read_options()
    L.seed_everything(options.seed)  # every process builds the same student and teacher
    task = CausalLM()
    student = task.load(options.student) if options.student else small(32)
    teacher = task.load(options.teacher) if options.teacher else small(64)
    module = KD(
        student.train(),
        FrozenTeacher(teacher, dtype=getattr(torch, options.teacher_dtype), sharded=options.spread_teacher),
        temperature=1.0,
        alpha=0.1,
        task=task,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=options.lr),
    )
    data = TextDataModule(
        files=options.files,
        tokenizer=options.student,
        length=options.length,
        batch_size=options.batch_size,
        seed=options.seed,
        validation=0.02,
        test=0.0,
    )
    folder = Path(options.folder)
    # A new name for each: the last one is deleted after the next is complete, and never overwritten.
    checkpoints = ModelCheckpoint(folder, "{step:08d}", every_n_train_steps=options.save_every, save_top_k=1)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.nodes,
        strategy=strategy(options),
        precision=options.precision,
        max_steps=options.steps,
        max_epochs=-1,
        accumulate_grad_batches=options.accumulate,
        val_check_interval=options.save_every,
        check_val_every_n_epoch=None,
        limit_val_batches=20,
        callbacks=[checkpoints],
        logger=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=data, ckpt_path=newest_checkpoint(folder))
    module.export(folder / "student.safetensors", overwrite=True)  # every process calls it, the first one writes


def newest_checkpoint(folder: Path) -> str | None:
    """The last one that is complete: a file, or a folder of shards with the file that is written after them."""
    found = [path for path in folder.glob("step=*.ckpt") if path.is_file() or (path / "meta.pt").is_file()]
    return str(max(found)) if found else None


def strategy(options: argparse.Namespace) -> str | Strategy:
    """What the Trainer gets as ``strategy``."""
    if options.strategy == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=options.devices * options.nodes, tensor_parallel_size=1)
    if options.strategy == "deepspeed":
        return "deepspeed_stage_2"
    return str(options.strategy)


def small(width: int) -> Any:
    """A GPT with random weights for the default data."""
    config = {"vocab_size": 512, "n_positions": 128, "n_embd": width, "n_layer": 2, "n_head": 2}
    return from_config("gpt2", "causal-lm", config | {"bos_token_id": 0, "eos_token_id": 0})


def read_options() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategy", choices=["auto", "ddp", "fsdp2", "deepspeed"], default="ddp")
    parser.add_argument("--student", help="name or folder; default: a small random model")
    parser.add_argument("--teacher", help="name or folder; default: a small random model")
    parser.add_argument("--teacher-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--spread-teacher", action="store_true", help="with fsdp2: the teacher does not fit one device")
    parser.add_argument("--files", nargs="+", help="text files; default: the documentation of Python")
    parser.add_argument("--folder", default="runs/scale")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", type=int, default=1, help="per machine")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="per device")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
