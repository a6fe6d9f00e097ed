"""Short texts, tokenized and padded batch by batch: for sentence encoders and for classifiers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from lightning_distill.compatibility import check_reader
from lightning_distill.datamodules.columns import Columns, load_dataset, read_dataset, read_files
from lightning_distill.datamodules.samplers import ResumableDataModule, ResumableLoader, check_seed
from lightning_distill.datamodules.tensors import own_generator, pass_through
from lightning_distill.datamodules.text import Parts, standard_library, train_tokenizer
from lightning_distill.packages import package_path

SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",)}
SHORTEST_SENTENCE, LONGEST_SENTENCE = 30, 160


class TokenizedTexts(Dataset[dict[str, Tensor]]):
    """Tokenized samples of one text or two, padded to the longest of each batch.

    Args:
        rows: Token ids; of a sample with two texts, both after each other.
        labels: One per sample, or ``None``.
        padding: Id of the padding token.
        texts: Texts per sample, 1 or 2.
        segments: ``token_type_ids`` of each row, or ``None``.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[int]],
        labels: Tensor | None,
        *,
        padding: int = 0,
        texts: int = 1,
        segments: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.rows = [torch.tensor(row, dtype=torch.int32) for row in rows]
        self.segments = None if segments is None else [torch.tensor(row, dtype=torch.int32) for row in segments]
        self.labels = labels
        self.padding = padding
        self.texts = texts

    def __len__(self) -> int:
        return len(self.rows) // self.texts

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sample's longest text."""
        return torch.tensor([len(row) for row in self.rows]).view(-1, self.texts).amax(dim=1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch; a sample with two texts gives two rows, each with its label. ``index`` numbers the rows."""
        first = torch.as_tensor(indices) * self.texts
        numbers = torch.stack([first + k for k in range(self.texts)], dim=1).flatten()
        rows = [self.rows[number] for number in numbers.tolist()]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.padding).long()
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        batch = {"input_ids": ids, "attention_mask": mask, "index": numbers}
        if self.segments is not None:
            batch["token_type_ids"] = pad_sequence(
                [self.segments[n] for n in numbers.tolist()], batch_first=True
            ).long()
        if self.labels is not None:
            batch["labels"] = self.labels[torch.as_tensor(indices)].repeat_interleave(self.texts)
        return batch


class _ShortTexts(ResumableDataModule):
    """Common part of the data modules below: where texts come from, how they are split, tokenized and batched."""

    def __init__(
        self,
        files: Sequence[str | Path] | None,
        dataset: Any,
        tokenizer: str | None,
        columns: Sequence[str],
        *,
        max_length: int,
        train_size: int | None,
        eval_size: int | None,
        batch_size: int,
        eval_batch_size: int,
        seed: int,
        validation: float,
        test: float,
        vocab_size: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        if isinstance(files, (str, Path)):
            raise ValueError(
                f"`files` must be a list of paths, got the single path {str(files)!r}; put it in brackets."
            )
        if files is not None and (len(files) == 0 or dataset is not None):
            raise ValueError("Name at least one file in `files`, or none and a `dataset`; not both.")
        sizes = {"max_length": max_length, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        sizes |= {
            name: size for name, size in {"train_size": train_size, "eval_size": eval_size}.items() if size is not None
        }
        for name, size in sizes.items():
            if not size >= 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        for name, share in {"validation": validation, "test": test, "validation + test": validation + test}.items():
            if not 0 <= share < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {share}; it is a share of the texts.")
        if not num_workers >= 0:
            raise ValueError(f"`num_workers` must be at least 0, got {num_workers}.")
        check_seed(seed)
        self.files = None if files is None else [Path(file) for file in files]
        self.dataset = dataset
        self.tokenizer_name = tokenizer
        self.columns = list(columns)
        self.max_length = max_length
        self.train_size_asked = train_size
        self.eval_size = eval_size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.shares = (validation, test)
        self.trained_vocab_size = vocab_size
        self.num_workers = num_workers
        self._tokenizer: Any = None
        self._parts: Parts | None = None
        self._texts: Parts | None = None

    def default_texts(self) -> Columns:
        """What there is without files and data set."""
        raise ValueError(f"{type(self).__name__} needs `files` or a `dataset`.")

    def encode(self, columns: Columns, tokenizer: Any) -> TokenizedTexts:
        """Samples of a part."""
        raise TypeError(f"{type(self).__name__} is a data module of texts without `encode(...)`; define it.")

    @property
    def tokenizer(self) -> Any:
        """The transformers tokenizer."""
        self._load()
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens: what a model's embedding needs at least."""
        return len(self.tokenizer)

    @property
    def parts(self) -> Parts:
        """Training, validation and test set, :class:`TokenizedTexts`; ``None`` where there is none."""
        return self._load()

    @property
    def texts(self) -> Parts:
        """Columns of each part, as they were read; ``None`` where there is none."""
        if self._texts is None:
            self._texts = self._read()
        return self._texts

    @property
    def train_size(self) -> int:
        """Number of rows of the training set: every ``index`` of a training batch is below it."""
        return len(self.parts.train.rows)

    def setup(self, stage: str | None = None) -> None:
        """Load the texts, once, and refuse models that cannot read them."""
        super().setup(stage)
        self._load()
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        for network in (getattr(module, "student", None), getattr(getattr(module, "teacher", None), "network", None)):
            if network is not None:
                check_reader(network, self.tokenizer, self.max_length)

    def train_dataloader(self) -> ResumableLoader:
        """Batches of texts of like length, in another order in every epoch; the last may be smaller."""
        data: TokenizedTexts = self.parts.train
        return ResumableLoader(
            data,
            batch_size=self.batch_size,
            sampler=self.train_sampler(len(data), batch_size=self.batch_size, seed=self.seed, lengths=data.lengths),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=pass_through,
            generator=own_generator(),
        )

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]] | list[DataLoader[dict[str, Tensor]]]:
        """Batches of the validation set, in order; none if there is no such set."""
        return [] if self.parts.validation is None else self._in_order(self.parts.validation)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of the test set, in order.

        Raises:
            ValueError: If there is none.
        """
        if self.parts.test is None:
            raise ValueError("There is no test set: its share `test` is 0, and the data set has no such split.")
        return self._in_order(self.parts.test)

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Batches of the training set, in order: what a teacher is cached on."""
        return self._in_order(self.parts.train)

    def _in_order(self, data: TokenizedTexts) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(data, batch_size=self.eval_batch_size, collate_fn=pass_through, generator=own_generator())

    def _load(self) -> Parts:
        if self._parts is None:
            texts = self.texts
            self._tokenizer = (
                train_tokenizer(texts.train[self.columns[0]], self.trained_vocab_size)
                if self.tokenizer_name is None
                else _load_tokenizer(self.tokenizer_name)
            )
            self._parts = Parts(*(None if part is None else self.encode(part, self._tokenizer) for part in texts))
        return self._parts

    def _read(self) -> Parts:
        """Columns of each part, ``None`` where there is none."""
        source = load_dataset(self.dataset) if isinstance(self.dataset, str) else self.dataset
        if source is not None and "train" in source and not hasattr(source, "features"):
            found = {part: next((name for name in names if name in source), None) for part, names in SPLITS.items()}
            splits = [None if name is None else read_dataset(source[name], self.columns) for name in found.values()]
            if splits[1] is not None or splits[2] is not None:
                sizes = (self.train_size_asked, self.eval_size, self.eval_size)
                return Parts(*(_first(part, size) for part, size in zip(splits, sizes, strict=True)))
            columns = splits[0]
        elif source is not None:
            columns = read_dataset(source, self.columns)
        else:
            columns = self.default_texts() if self.files is None else read_files(self.files, self.columns)
        assert columns is not None
        return self._split(columns)

    def _split(self, columns: Columns) -> Parts:
        rows: tuple[list[tuple[float, int]], ...] = ([], [], [])
        validation, test = self.shares
        for number, text in enumerate(columns[self.columns[0]]):
            place = _place(text)
            rows[1 if place < validation else 2 if place < validation + test else 0].append((place, number))
        parts: list[Columns | None] = []
        asked = (self.train_size_asked, self.eval_size, self.eval_size)
        for name, size, found, share in zip(Parts._fields, asked, rows, (1.0, *self.shares), strict=True):
            if share > 0 and not found:
                raise ValueError(
                    f"The {name} part has no text: there are {sum(map(len, rows))} in all. Add texts, or change the "
                    f"shares (validation {validation}, test {test})."
                )
            # by the hash: a larger choice contains a smaller one, and a choice is spread over all texts
            chosen = [number for _, number in (sorted(found)[:size] if size is not None else found)]
            made = {column: [values[number] for number in chosen] for column, values in columns.items()}
            parts.append(made if share > 0 else None)
        return Parts(*parts)


class SentenceDataModule(_ShortTexts):
    """Sentences for an encoder, alone or in pairs; by default those of this Python's documentation.

    Batches are dictionaries of ``input_ids`` and ``attention_mask``, shape ``(B, T)``, padded to the longest text of
    the batch, and ``index``, as :class:`~lightning_distill.embedding.Embedding` reads them. Training batches hold texts
    of like length. With ``pair`` a sample is two texts, in rows 0 and 1, 2 and 3, … of a batch; ``label`` is their
    similarity, the same for both rows. A text's part (training, validation, test) depends on the text alone, so equal
    texts never stand in two. A run that is killed resumes with the samples that were left.

    Args:
        files: Local files: ``.txt`` with a text per line, ``.csv`` and ``.tsv`` with a header, or ``.jsonl``.
        dataset: Hugging Face data set, or its name or folder; splits called train, validation and test are used.
            Default, without ``files``: sentences of the standard library's documentation.
        tokenizer: Hugging Face name, local folder, or ``package:NAME/folder``. Default: train one on the texts.
        text: Column of the texts.
        pair: Column of the second texts.
        label: Column of the similarities of pairs, numbers; empty or NaN where there is none.
        max_length: Tokens per text; what comes after is cut.
        train_size: How many samples to train on, at most; ``None`` for all. A larger number contains a smaller one.
        eval_size: The same of validation and test, each.
        batch_size: Samples per training batch and rank; a pair is one sample, and two rows.
        eval_batch_size: The same of validation and test.
        seed: Of the order.
        validation: Share of the texts, in [0, 1), where the source has no splits; 0 for no such set.
        test: The same.
        vocab_size: Of a tokenizer that is trained.
        num_workers: Processes that load training batches; texts in memory need none.

    Raises:
        ValueError: If an argument is outside its range; in ``setup``, if a column is missing, a part has no text, or
            texts are longer than the context of the module's student or teacher.
        FileNotFoundError: In ``setup``, if a file does not exist.

    Example:
        >>> data = SentenceDataModule(train_size=1000, max_length=32)
        >>> data.max_length, data.columns
        (32, ['text'])
    """

    def __init__(
        self,
        files: Sequence[str | Path] | None = None,
        dataset: Any = None,
        tokenizer: str | None = None,
        *,
        text: str = "text",
        pair: str | None = None,
        label: str | None = None,
        max_length: int = 64,
        train_size: int | None = None,
        eval_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 100,
        seed: int = 0,
        validation: float = 0.05,
        test: float = 0.05,
        vocab_size: int = 1000,
        num_workers: int = 0,
    ) -> None:
        if label is not None and pair is None:
            raise ValueError(
                f"`label` is {label!r}, but there is no `pair`: labels are similarities of pairs. For classes use "
                "`TextClassificationDataModule`."
            )
        super().__init__(
            files,
            dataset,
            tokenizer,
            [column for column in (text, pair, label) if column is not None],
            max_length=max_length,
            train_size=train_size,
            eval_size=eval_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
            test=test,
            vocab_size=vocab_size,
            num_workers=num_workers,
        )
        self.text, self.pair, self.label = text, pair, label

    def default_texts(self) -> Columns:
        """Sentences of the standard library's documentation.

        Raises:
            ValueError: If pairs are asked for.
        """
        if self.pair is not None:
            raise ValueError("The standard library has no pairs of sentences; name `files` or a `dataset`.")
        return {self.text: sentences(standard_library())}

    def encode(self, columns: Columns, tokenizer: Any) -> TokenizedTexts:
        """Texts, of pairs both after each other."""
        texts = columns[self.text]
        if self.pair is not None:
            texts = [text for both in zip(texts, columns[self.pair], strict=True) for text in both]
        labels = None if self.label is None else torch.tensor([_number(value) for value in columns[self.label]])
        ids = tokenizer(list(map(str, texts)), truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
        return TokenizedTexts(ids, labels, padding=_padding(tokenizer), texts=1 if self.pair is None else 2)


class TextClassificationDataModule(_ShortTexts):
    """Texts, or pairs of them, with a class each.

    Batches are dictionaries of ``input_ids``, ``attention_mask``, ``labels`` and ``index``, padded to the longest text
    of the batch, and ``token_type_ids`` for pairs where the tokenizer gives them, as
    :class:`~lightning_distill.tasks.SequenceClassification` reads them. The two texts of a pair are one sequence.

    Args:
        files: See :class:`SentenceDataModule`, as for all that is not listed.
        dataset: …
        tokenizer: …
        text: …
        pair: Column of second texts (questions and passages, premises and hypotheses).
        label: Column of the classes: numbers from 0, ``-100`` where there is none; or names, which are numbered in
            alphabetical order of those in the training set.
        max_length: Tokens per text or pair.
        train_size: …
        eval_size: …
        batch_size: …
        eval_batch_size: …
        seed: …
        validation: …
        test: …
        vocab_size: …
        num_workers: …

    Raises:
        ValueError: As :class:`SentenceDataModule`; in ``setup``, if a label is unknown.
        FileNotFoundError: In ``setup``, if a file does not exist.

    Example:
        >>> TextClassificationDataModule(["reviews.csv"], label="stars").columns
        ['text', 'stars']
    """

    def __init__(
        self,
        files: Sequence[str | Path] | None = None,
        dataset: Any = None,
        tokenizer: str | None = None,
        *,
        text: str = "text",
        pair: str | None = None,
        label: str = "label",
        max_length: int = 128,
        train_size: int | None = None,
        eval_size: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 100,
        seed: int = 0,
        validation: float = 0.05,
        test: float = 0.05,
        vocab_size: int = 1000,
        num_workers: int = 0,
    ) -> None:
        if files is None and dataset is None:
            raise ValueError("`files` and `dataset` are both None; texts with classes must come from somewhere.")
        super().__init__(
            files,
            dataset,
            tokenizer,
            [column for column in (text, pair, label) if column is not None],
            max_length=max_length,
            train_size=train_size,
            eval_size=eval_size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
            test=test,
            vocab_size=vocab_size,
            num_workers=num_workers,
        )
        self.text, self.pair, self.label = text, pair, label

    @property
    def classes(self) -> list[str]:
        """Names of the classes in their order; of numbered ones, their numbers."""
        values = self.texts.train[self.label]
        known = {value for value in values if not _is_number(value)}
        if known:
            return sorted(known)
        return [str(number) for number in range(max(int(value) for value in values) + 1)]

    def encode(self, columns: Columns, tokenizer: Any) -> TokenizedTexts:
        """Texts or joined pairs, and classes."""
        texts = [list(map(str, columns[name])) for name in (self.text, self.pair) if name is not None]
        found = tokenizer(*texts, truncation=True, max_length=self.max_length, verbose=False)
        segments = found.get("token_type_ids") if self.pair is not None else None
        return TokenizedTexts(
            found["input_ids"], self._labels(columns[self.label]), padding=_padding(tokenizer), segments=segments
        )

    def _labels(self, values: Sequence[Any]) -> Tensor:
        if all(map(_is_number, self.texts.train[self.label])):
            return torch.tensor([int(value) for value in values])
        numbers = {name: number for number, name in enumerate(self.classes)}
        if unknown := [value for value in values if value not in numbers]:
            raise ValueError(
                f"The class {unknown[0]!r} does not occur in the training set, whose classes are "
                f"{', '.join(map(str, numbers))}."
            )
        return torch.tensor([numbers[value] for value in values])


def sentences(paragraphs: Iterable[str]) -> list[str]:
    """Sentences of ``paragraphs``, each once: of 30 to 160 characters, nearly all letters and spaces.

    Example:
        >>> sentences(["Too short. This one has enough characters to be kept.\\nx = 1"])
        ['This one has enough characters to be kept.']
    """
    found: dict[str, None] = {}
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            letters = sum(character.isalpha() or character == " " for character in sentence)
            if (
                SHORTEST_SENTENCE <= len(sentence) <= LONGEST_SENTENCE
                and sentence[0].isupper()
                and sentence[-1] in ".!?"
                and letters >= 0.9 * len(sentence)
            ):
                found.setdefault(sentence)
    return list(found)


def _place(text: Any) -> float:
    """A number in [0, 1) that depends on the text alone; white space makes no difference."""
    digest = hashlib.blake2b(" ".join(str(text).split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _first(columns: Columns | None, size: int | None) -> Columns | None:
    return None if columns is None else {name: values[:size] for name, values in columns.items()}


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    load: Any = AutoTokenizer.from_pretrained
    return load(package_path(name))


def _padding(tokenizer: Any) -> int:
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def _number(value: Any) -> float:
    return float("nan") if value in ("", None) else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and re.fullmatch(r"-?\d+", value.strip()) is not None)


__all__ = ["SentenceDataModule", "TextClassificationDataModule", "TokenizedTexts", "sentences"]
