"""Text for language models: the documentation in Python's own standard library, or the user's files."""

from __future__ import annotations

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_distill.compatibility import check_reader
from lightning_distill.datamodules.disk_cache import cached
from lightning_distill.datamodules.samplers import ResumableDataModule, ResumableLoader, check_seed
from lightning_distill.datamodules.tensors import own_generator, pass_through

END = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # one token per byte, and the end of a text


class Blocks(Dataset[dict[str, Tensor]]):
    """A long text, cut into sequences of equal length; whole batches at once.

    Args:
        tokens: Of the text, shape ``(N,)``; the rest that does not fill a sequence is left out.
        length: Tokens per sequence.
    """

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens = tokens[: len(tokens) // length * length].reshape(-1, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch: ``input_ids``, ``attention_mask``, ``labels`` and ``index``."""
        index = torch.as_tensor(indices)
        ids = self.tokens[index].long()
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), "index": index}


class Parts(NamedTuple):
    """Something for training, validation and test."""

    train: Any
    validation: Any
    test: Any


class TextDataModule(ResumableDataModule):
    """Data module for causal language models; by default the docstrings and help texts of this Python.

    Texts are taken apart into paragraphs. Equal ones are dropped *before* the paragraphs are split into training,
    validation and test (documentation repeats itself: a split of the texts as they are would leak a quarter), and a
    paragraph's part depends on the paragraph alone: more files change no assignment. The paragraphs of a part, each
    followed by an end-of-text token, are cut into sequences of ``length`` tokens, without padding.

    Batches are dictionaries of ``input_ids``, ``attention_mask`` and ``labels``, shape ``(B, length)``, and ``index``,
    the number of each sequence, as :class:`~lightning_distill.tasks.CausalLM` and transformers models read them. The
    order comes from ``seed`` and the epoch. A run that is killed resumes with the sequences that were left.

    Without ``tokenizer``, a byte-level BPE tokenizer with ``vocab_size`` tokens is trained on the training paragraphs.
    Texts of the standard library, tokens and tokenizer are kept where ``LIGHTNING_DISTILL_CACHE`` says, by default
    ``~/.cache/lightning_distill``. The standard library's texts, about two million characters, depend on the version of
    Python: compare losses within one version.

    Args:
        files: Local text files (UTF-8) instead of the standard library's texts; paragraphs end at blank lines.
        tokenizer: Hugging Face name or local folder of a tokenizer. Default: train one.
        vocab_size: Of the tokenizer that is trained, at least 257.
        length: Tokens per sequence, at least 2.
        batch_size: Of training, per rank.
        eval_batch_size: Of validation and test, per rank.
        seed: Of the order.
        validation: Share of the paragraphs, in [0, 1); 0 for no such set.
        test: The same.
        num_workers: Processes that load training batches; indexing tensors in memory needs none.

    Raises:
        ValueError: If an argument is outside its range or ``files`` is an empty list; in ``setup``, if a part has no
            full sequence, or the sequences are longer than the context of the module's student or teacher.
        FileNotFoundError: In ``setup``, if a file does not exist.

    Example:
        >>> data = TextDataModule(length=64, batch_size=16)
        >>> data.length, data.vocab_size
        (64, 512)
    """

    def __init__(
        self,
        files: Sequence[str | Path] | None = None,
        tokenizer: str | None = None,
        *,
        vocab_size: int = 512,
        length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        seed: int = 0,
        validation: float = 0.05,
        test: float = 0.05,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(files, (str, Path)):
            raise ValueError(
                f"`files` must be a list of paths, got the single path {str(files)!r}; put it in brackets."
            )
        if files is not None and len(files) == 0:
            raise ValueError("`files` is empty. Name at least one file, or pass None for the standard library's texts.")
        if not length >= 2:
            raise ValueError(f"`length` must be at least 2, got {length}: there would be no next token to predict.")
        if tokenizer is None and not vocab_size >= SMALLEST_VOCABULARY:
            raise ValueError(
                f"`vocab_size` must be at least {SMALLEST_VOCABULARY} (256 bytes and the end of a text), got "
                f"{vocab_size}."
            )
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            if not value >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name, share in {"validation": validation, "test": test, "validation + test": validation + test}.items():
            if not 0 <= share < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {share}; it is a share of the paragraphs.")
        if not num_workers >= 0:
            raise ValueError(f"`num_workers` must be at least 0, got {num_workers}.")
        check_seed(seed)
        self.files = None if files is None else [Path(file) for file in files]
        self.tokenizer_name = tokenizer
        self._vocab_size = vocab_size
        self.length = length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.shares = (validation, test)
        self.num_workers = num_workers
        self._tokenizer: Any = None
        self._blocks: Parts | None = None

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        self._load()
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens: what a model's embedding needs at least."""
        return self._vocab_size if self.tokenizer_name is None else len(self.tokenizer)

    @property
    def blocks(self) -> Parts:
        """The sequences of each part, :class:`Blocks`."""
        return self._load()

    @property
    def train_size(self) -> int:
        """Number of training sequences: every ``index`` of a training batch is below it."""
        return len(self.blocks.train)

    def prepare_data(self) -> None:
        """Read and tokenize on one process per node, so that the others find the result on disk."""
        self._load()

    def setup(self, stage: str | None = None) -> None:
        """Load the sequences, once, and refuse models that cannot read them."""
        super().setup(stage)
        self._load()
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        for network in (getattr(module, "student", None), getattr(getattr(module, "teacher", None), "network", None)):
            if network is not None:
                check_reader(network, self.tokenizer, self.length)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the training set, shuffled anew in every epoch; the last may be smaller."""
        return ResumableLoader(
            self.blocks.train,
            batch_size=self.batch_size,
            sampler=self.train_sampler(self.train_size, batch_size=self.batch_size, seed=self.seed),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=pass_through,
            generator=own_generator(),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        """Batches of the validation set, in order; none if its share is 0."""
        return self._in_order(self.blocks.validation) if self.shares[0] > 0 else []

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of the test set, in order.

        Raises:
            ValueError: If its share is 0.
        """
        if self.shares[1] == 0:
            raise ValueError("There is no test set: its share `test` is 0.")
        return self._in_order(self.blocks.test)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of the training set, in order: what a teacher is cached on."""
        return self._in_order(self.blocks.train)

    def _in_order(self, blocks: Blocks) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(blocks, batch_size=self.eval_batch_size, collate_fn=pass_through, generator=own_generator())

    def _load(self) -> Parts:
        if self._blocks is None:
            paragraphs = standard_library() if self.files is None else unique(_read(self.files))
            parts = split(paragraphs, *self.shares)
            if self.tokenizer_name is None:
                self._tokenizer, tokens = _tokenized(parts, self._vocab_size)
            else:
                self._tokenizer = _load_tokenizer(self.tokenizer_name)
                tokens = Parts(*(_encode(self._tokenizer, part) for part in parts))
            blocks = Parts(*(Blocks(part, self.length) for part in tokens))
            for name, part, share in zip(Parts._fields, blocks, (1.0, *self.shares), strict=True):
                if share > 0 and len(part) == 0:
                    raise ValueError(
                        f"The {name} part has no full sequence: {len(getattr(tokens, name))} tokens in "
                        f"{len(getattr(parts, name))} paragraphs, and `length` is {self.length}. Shorten `length`, add "
                        f"text, or change the shares (validation {self.shares[0]}, test {self.shares[1]})."
                    )
            self._blocks = blocks
        return self._blocks


def standard_library() -> list[str]:
    """The paragraphs of this Python's docstrings and help texts, each once; read once per version of Python.

    The package's tests and what is installed beside it are left out.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    paragraphs: list[str] = cached(
        f"documentation-{sys.implementation.name}-{version}.pt", lambda: {"paragraphs": unique(_documentation())}
    )["paragraphs"]
    return paragraphs


def unique(texts: Iterable[str]) -> list[str]:
    """Paragraphs of ``texts``, which blank lines separate, each once; white space makes no difference.

    Example:
        >>> unique(["One.\\n\\nTwo\\nlines.", "Two lines."])
        ['One.', 'Two\\nlines.']
    """
    first: dict[str, str] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            first.setdefault(" ".join(paragraph.split()), paragraph.strip())
    first.pop("", None)
    return list(first.values())


def split(paragraphs: Iterable[str], validation: float, test: float) -> Parts:
    """Assign each paragraph to training, validation or test by a hash of it: whatever else there is, it stays there.

    Args:
        paragraphs: Each once.
        validation: Share of them.
        test: Share of them.

    Returns:
        Three lists, in the given order.
    """
    parts = Parts([], [], [])
    for paragraph in paragraphs:
        digest = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
        position = int.from_bytes(digest, "big") / 2**64
        parts[1 if position < validation else 2 if position < validation + test else 0].append(paragraph)
    return parts


def train_tokenizer(paragraphs: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer: every text can be written with it, whatever it was trained on.

    Args:
        paragraphs: To train it on.
        vocab_size: Number of tokens at most, the end of a text being the first.

    Returns:
        A transformers tokenizer, which ``save_pretrained`` can write beside an exported student.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    return _wrapped(tokenizer)


def _tokenized(parts: Parts, vocab_size: int) -> tuple[Any, Parts]:
    """A tokenizer trained on the training part, and the tokens of all parts; from disk if they were made before."""
    import tokenizers

    content = hashlib.blake2b(digest_size=16)
    for part in parts:
        content.update(b"".join(len(text).to_bytes(8, "big") + text.encode() for text in part) + b"part")
    name = f"tokens-{tokenizers.__version__}-{vocab_size}-{content.hexdigest()}.pt"
    saved = cached(name, lambda: _tokenize(parts, vocab_size))
    return _wrapped(tokenizers.Tokenizer.from_str(saved["tokenizer"])), Parts(*saved["tokens"])


def _tokenize(parts: Parts, vocab_size: int) -> dict[str, Any]:
    tokenizer = train_tokenizer(parts.train, vocab_size)
    return {"tokenizer": tokenizer.backend_tokenizer.to_str(), "tokens": [_encode(tokenizer, part) for part in parts]}


def _wrapped(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    load: Any = AutoTokenizer.from_pretrained
    return load(name)


def _encode(tokenizer: Any, paragraphs: list[str]) -> Tensor:
    """Tokens of the paragraphs, each with the end of a text behind it, int32."""
    if not paragraphs:
        return torch.zeros(0, dtype=torch.int32)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    tail = [] if end is None else [end]
    encoded = tokenizer(paragraphs, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for ids in encoded for token in (*ids, *tail)], dtype=torch.int32)


def _read(files: Sequence[Path]) -> Iterator[str]:
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"There is no text file {str(file)!r}, which `files` names.")
        yield file.read_text(encoding="utf-8")


def _documentation() -> Iterator[str]:
    """The docstrings of the standard library, file by file, and the texts behind ``help()``."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"}.isdisjoint(file.relative_to(root).parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in somebody else's code
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node) or ""
                yield text.encode("utf-8", "replace").decode()  # half a surrogate pair is no text
    yield from topics.values()


__all__ = ["TextDataModule", "split", "standard_library", "train_tokenizer", "unique"]
