"""Two stages without validation data in two processes. Run by test_pipeline_processes.py."""

import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_distill import KD, Experiment, Pipeline, Stage
from lightning_distill.datamodules import TensorDataModule
from tests.pipeline.parts import CPU, SGD

folder, kind = Path(sys.argv[1]), sys.argv[2]


def strategy():
    return "ddp" if kind == "ddp" else ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)


def experiment(teacher=None):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(64, 6, generator=generator)
    student = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    module = KD(student, teacher, alpha=1.0 if teacher is None else 0.5, optimizer=SGD)
    return Experiment(
        module, TensorDataModule((x, x[:, :3].argmax(1)), batch_size=8), CPU | {"devices": 2, "strategy": strategy()}
    )


def second(earlier):
    torch.save(earlier.first.network.state_dict(), folder / f"teacher-{rank_zero_only.rank}.pt")
    return experiment(earlier.first.teacher())


if __name__ == "__main__":
    torch.set_num_threads(1)
    Pipeline([Stage("teacher", lambda earlier: experiment()), Stage("student", second)]).run(folder / "run")
