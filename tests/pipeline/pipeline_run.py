"""A pipeline in one or more processes: ``pipeline_run.py FOLDER DEVICES KILL_IN KILL_AT``."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback

from lightning_distill import Pipeline
from tests.pipeline.parts import chain

folder, devices, kill_in, kill_at = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])


class Kill(Callback):
    """Ends the first process as a power failure would, and writes down the steps that were made."""

    def __init__(self, stage):
        self.stage = stage

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (folder / f"steps-{trainer.global_rank}.txt").open("a") as steps:
            steps.write(f"{self.stage} {trainer.global_step}\n")
        if trainer.is_global_zero and self.stage == kill_in and trainer.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def stages():
    for stage in chain(devices=devices, strategy="ddp" if devices > 1 else "auto").stages:

        def build(earlier, stage=stage):
            made = stage.build(earlier)
            return replace(made, trainer={**made.trainer, "callbacks": [Kill(stage.name)]})

        yield replace(stage, build=build, save_every_n_steps=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    report = Pipeline(list(stages())).run(folder / "run")
    print(f"RANK {os.environ.get('RANK', os.environ.get('LOCAL_RANK', '0'))} {[s.metric for s in report.stages]}")
