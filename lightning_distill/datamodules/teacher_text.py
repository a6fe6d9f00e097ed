"""Text that a teacher has written, for a student to learn by heart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_distill.datamodules.disk_cache import cached
from lightning_distill.datamodules.text import Parts, TextDataModule
from lightning_distill.decoding import Strategy, teacher_sequences
from lightning_distill.outputs import UNLABELLED
from lightning_distill.teachers import fingerprint


class WrittenBlocks(Dataset[dict[str, Tensor]]):
    """Texts one after the other, cut into sequences of equal length; whole batches at once.

    Nothing tells what a text begins with, so the first token of each has no label.

    Args:
        texts: Tokens of each, shape ``(L,)``.
        length: Tokens per sequence; the rest that does not fill one is left out.
    """

    def __init__(self, texts: Iterable[Tensor], length: int) -> None:
        texts = list(texts)
        tokens = torch.cat([*texts, torch.empty(0)]).int()
        labels = tokens.clone()
        starts = torch.tensor([0, *map(len, texts)]).cumsum(0)[:-1]
        labels[starts] = UNLABELLED
        whole = len(tokens) // length * length
        self.tokens, self.labels = (values[:whole].reshape(-1, length) for values in (tokens, labels))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch: ``input_ids``, ``attention_mask``, ``labels`` and ``index``."""
        index = torch.as_tensor(indices)
        ids = self.tokens[index].long()
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": self.labels[index].long(),
            "index": index,
        }


class TeacherTextDataModule(TextDataModule):
    """:class:`TextDataModule` whose training texts a teacher has written: sequence-level distillation.

    The teacher continues the beginnings of training paragraphs, once; the student learns the result by plain
    cross-entropy, ``KD(student, alpha=1.0)``. With ``strategy="beam"`` these are the teacher's best sequences, as in
    Kim and Rush (2016), https://arxiv.org/abs/1606.07947; with ``"top_k"`` it speaks freely, which keeps its doubts.
    Validation and test are the texts that people have written. What the teacher writes is kept on disk, as the tokens
    of :class:`TextDataModule` are.

    Args:
        teacher: A transformers causal language model with the same tokenizer.
        prompt: Tokens of each paragraph that the teacher continues, below ``length``; shorter ones are left out.
        texts: How many paragraphs are continued, spread over the training set; less if there are fewer.
        strategy: See :func:`~lightning_distill.decoding.teacher_sequences`, as for ``num``.
        num: Beams, or samples per prompt.
        top_k: Number of most likely tokens that ``"top_k"`` draws from; 0 for all.
        arguments: Those of :class:`TextDataModule`.

    Raises:
        ValueError: If an argument is outside its range, or as :class:`TextDataModule`; in ``setup``, if the tokenizer
            has no end of a text, there is no paragraph of more than ``prompt`` tokens, or too little was written to
            fill a sequence.
    """

    def __init__(
        self,
        teacher: nn.Module,
        prompt: int = 16,
        texts: int = 4096,
        strategy: Strategy = "beam",
        num: int = 4,
        top_k: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if not 1 <= prompt < self.length:
            raise ValueError(f"`prompt` must be at least 1 and below `length`, which is {self.length}; got {prompt}.")
        if not texts >= 1:
            raise ValueError(f"`texts` must be at least 1, got {texts}.")
        self.teacher = teacher
        self.prompt = prompt
        self.texts = texts
        self.settings: dict[str, Any] = {"strategy": strategy, "num": num}
        if strategy == "top_k":
            self.settings["top_k"] = top_k
        self._written: Parts | None = None

    def _load(self) -> Parts:
        if self._written is None:
            parts = super()._load()
            prompts = beginnings(parts.train.tokens.flatten(), self.tokenizer_end, self.prompt)
            if len(prompts) == 0:
                raise ValueError(
                    f"No training paragraph has more than `prompt` = {self.prompt} tokens; give a smaller one."
                )
            chosen = torch.linspace(0, len(prompts) - 1, min(self.texts, len(prompts))).long()
            blocks = WrittenBlocks(self._continued(prompts[chosen].long()), self.length)
            if len(blocks) == 0:
                raise ValueError(
                    f"What the teacher has written does not fill a sequence of {self.length} tokens. Let it continue "
                    "more `texts`, or shorten `length`."
                )
            self._written = Parts(blocks, parts.validation, parts.test)
        return self._written

    @property
    def tokenizer_end(self) -> int:
        """The token that ends a text.

        Raises:
            ValueError: If the tokenizer has none.
        """
        end = self._tokenizer.eos_token_id
        if end is None:
            raise ValueError("The tokenizer has no end of a text (`eos_token`), so paragraphs cannot be told apart.")
        return int(end)

    def _continued(self, prompts: Tensor) -> list[Tensor]:
        """Paragraphs that begin with ``prompts``, shape ``(N, prompt)``, in the teacher's words."""
        digest = hashlib.blake2b(prompts.numpy().tobytes(), digest_size=16)
        digest.update(repr((fingerprint(self.teacher), self.length, sorted(self.settings.items()))).encode())
        return list(cached(f"written-{digest.hexdigest()}.pt", lambda: self._write(prompts))["texts"])

    def _write(self, prompts: Tensor) -> dict[str, Any]:
        new = self.length - self.prompt
        records = teacher_sequences(self.teacher, prompts, max_new_tokens=new, batch_size=64, **self.settings)
        return {"texts": [record["input_ids"].int() for record in records]}


def beginnings(tokens: Tensor, end: int, length: int) -> Tensor:
    """The first ``length`` tokens of each text that is longer.

    Args:
        tokens: Texts one after the other, each followed by ``end``; shape ``(N,)``.
        end: Token that ends a text.
        length: At least 1.

    Returns:
        Shape ``(texts, length)``.

    Example:
        >>> beginnings(torch.tensor([5, 6, 7, 0, 8, 0, 9, 4, 3, 0]), end=0, length=2)
        tensor([[5, 6],
                [9, 4]])
    """
    if len(tokens) < length + 1:
        return tokens.new_empty(0, length)
    windows = tokens.unfold(0, length + 1, 1)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (tokens == end).nonzero().squeeze(1) + 1])
    found = windows[starts[starts < len(windows)]]
    return found[(found[:, :length] != end).all(dim=1) & (found[:, length] != end), :length]
