"""All stages at once: ``asynchronous_run.py FOLDER PUBLISH_EVERY KILL_IN``."""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import rich
import torch
from lightning.pytorch.callbacks import Callback

from lightning_distill import Pipeline
from lightning_distill.pipeline import run_asynchronously
from lightning_distill.teachers import FollowedTeacher
from tests.pipeline.parts import chain

folder, publish_every, kill_in = Path(sys.argv[1]), int(sys.argv[2]) or None, sys.argv[3]


class Watch(Callback):
    """Writes down what taught each step; ends the process once as a power failure would."""

    def __init__(self, stage):
        self.stage = stage

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        teacher = pl_module.teacher
        followed = teacher.version.step if isinstance(teacher, FollowedTeacher) else None
        with (folder / f"{self.stage}.txt").open("a") as steps:
            steps.write(f"{trainer.global_step} {followed}\n")
        killed = folder / "killed"
        if self.stage == kill_in and trainer.global_step == 7 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if kill_in == f"{self.stage} always":
            raise RuntimeError("this stage cannot work")


def stages():
    for stage in chain().stages:

        def build(earlier, stage=stage):
            made = stage.build(earlier)
            return replace(made, trainer={**made.trainer, "callbacks": [Watch(stage.name)]})

        yield replace(stage, build=build, save_every_n_steps=2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = {"publish_every": publish_every, "check_every": 2, "max_staleness": 4, "timeout": 120, "restarts": 1}
    rich.print(run_asynchronously(Pipeline(list(stages())), folder / "run", **options))
