"""A callback for configurations that ends the first process as a power failure would."""

import os
import signal
from pathlib import Path

import lightning as L


class Kill(L.Callback):
    """SIGKILL where the variable ``KILL`` says: ``low-rank:4`` after a step, ``recovered:test`` in its test.

    An environment variable, because a changed configuration would be another pipeline. Steps are written down.
    """

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """End here, perhaps."""
        stage = Path(trainer.default_root_dir).name
        with Path(os.environ["STEPS"]).open("a") as steps:
            steps.write(f"{trainer.global_rank} {stage} {trainer.global_step}\n")
        self._end(trainer, f"{stage}:{trainer.global_step}")

    def on_test_end(self, trainer, pl_module):
        """End here, perhaps."""
        self._end(trainer, f"{Path(trainer.default_root_dir).name}:test")

    def _end(self, trainer, place):
        if trainer.is_global_zero and os.environ.get("KILL") == place:
            os.kill(os.getpid(), signal.SIGKILL)
