"""Half of the batches generated, in two processes. Run by test_on_policy.py."""

import sys
from pathlib import Path

import lightning as L
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.callbacks.test_on_policy import OnPolicy, Seen, loader, module_of, rows

if __name__ == "__main__":
    seen, module = Seen(), module_of()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        use_distributed_sampler=False,  # the same prompts in both
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[OnPolicy(0.5, max_new_tokens=4, seed=3), seen],
    )
    trainer.fit(module, loader())
    found = {
        "weights": torch.nn.utils.parameters_to_vector(module.student.parameters()).detach(),
        "rows": [rows(batch) if "distill_mask" in batch else None for batch in seen.batches],
    }
    torch.save(found, Path(sys.argv[1]) / f"{trainer.global_rank}.pt")
