"""What a language model says, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from lightning_distill.callbacks.on_policy import generated_batch


class WriteSample(L.Callback):
    """Let the student continue a text when it has been tested, and keep what it writes.

    A number says how much it knows, a sample how it errs. The text goes to ``sample.txt`` in the Trainer's
    ``default_root_dir`` (in a comparison: of the run), and to the log of a logger that takes texts.

    Args:
        prompt: What it continues.
        max_new_tokens: How much it writes.
        temperature: Of the sampling.
        seed: Of the sampling, which does not touch the random numbers of anybody else.

    Raises:
        ValueError: If an argument is outside its range.
        TypeError: After the test, if there is no tokenizer, or the student cannot ``generate``.
    """

    def __init__(
        self, prompt: str = "Return the", max_new_tokens: int = 40, temperature: float = 0.7, seed: int = 0
    ) -> None:
        if not prompt:
            raise ValueError("`prompt` is empty; give a word at least.")
        if not max_new_tokens >= 1:
            raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"`temperature` must be positive and finite, got {temperature}.")
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.seed = seed

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        student = getattr(pl_module, "student", None)
        tokenizer: Any = getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if tokenizer is None or not callable(getattr(student, "generate", None)):
            raise TypeError(
                "WriteSample needs a data module with a `tokenizer`, such as TextDataModule, and a student that can "
                f"`generate`; got {type(trainer.datamodule).__name__} and {type(student).__name__}."  # type: ignore[attr-defined]
            )
        assert isinstance(student, nn.Module)
        ids = torch.tensor([tokenizer(self.prompt)["input_ids"]], device=pl_module.device)
        batch = generated_batch(
            student,
            {"input_ids": ids},
            max_new_tokens=self.max_new_tokens,
            min_prompt=ids.shape[1],
            temperature=self.temperature,
            seed=self.seed,
        )
        if not trainer.is_global_zero:
            return
        text = tokenizer.decode(batch["input_ids"][0])
        Path(trainer.default_root_dir, "sample.txt").write_text(text + "\n", encoding="utf-8")
        for logger in trainer.loggers:
            log_text = getattr(logger, "log_text", None)
            if callable(log_text):
                log_text("sample", columns=["text"], data=[[text]])
