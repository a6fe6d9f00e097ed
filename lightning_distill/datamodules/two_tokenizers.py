"""Texts as the tokens of two models, with the positions at which both have read the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.outputs import UNLABELLED

Text = str | tuple[str, str]
NOWHERE = -1


def aligned_positions(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[int]:
    """For each token of the student the teacher's token after which both have read exactly the same characters.

    There, and only there, their predictions are about the same continuation of the same text. Of several tokens that
    end at the same character (the bytes of one character) only the last has read it whole.

    Args:
        student_ends: Characters read after each token, not decreasing; -1 for a token that stands for no place in the
            text.
        teacher_ends: The same for the teacher's tokens.

    Returns:
        Index of the teacher's token, or -1, for each of the student's tokens.

    Example:
        "unhappy" as un|happy and as u|n|hap|py; both may stop after "un":

        >>> aligned_positions([2, 7], [1, 2, 5, 7])
        [1, 3]
    """
    teacher_last = {end: place for place, end in enumerate(teacher_ends)}
    student_last = {end: place for place, end in enumerate(student_ends)}
    return [
        teacher_last.get(end, NOWHERE) if end != NOWHERE and student_last[end] == place else NOWHERE
        for place, end in enumerate(student_ends)
    ]


class TwoTokenizers:
    """Collates texts for a student and a teacher with different tokenizers; pass it to a loader as ``collate_fn``.

    Both tokenize the same text, and an end-of-sequence token is added where they have one and the text is not cut.
    Positions are paired by the characters read (:func:`aligned_positions`), so that the teacher is heard about the same
    context, not about whatever token has the same number.

    Limits: the student learns from the teacher only where both have a token boundary; the share is typically a half to
    nine tenths (``(batch["teacher"]["position"] >= 0)`` tells). Both need fast tokenizers, for the offsets. Tokenizers
    that change the text (lower-casing) still count its original characters.

    Args:
        student_tokenizer: A fast tokenizer of transformers.
        teacher_tokenizer: The teacher's.
        max_length: Longest sequence of the student's tokens; what comes after is cut.
        teacher_max_length: The same for the teacher; by default twice ``max_length``, for it may need more tokens.

    Raises:
        TypeError: If a tokenizer is not fast.
        ValueError: If a length is below 2.
    """

    def __init__(
        self,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        *,
        max_length: int = 512,
        teacher_max_length: int | None = None,
    ) -> None:
        for name, tokenizer in {
            "student_tokenizer": student_tokenizer,
            "teacher_tokenizer": teacher_tokenizer,
        }.items():
            if not getattr(tokenizer, "is_fast", False):
                raise TypeError(
                    f"`{name}` must be a fast tokenizer, which tells the characters of each token; got "
                    f"{type(tokenizer).__name__}. Load it by `AutoTokenizer.from_pretrained(..., use_fast=True)`."
                )
        teacher_max_length = 2 * max_length if teacher_max_length is None else teacher_max_length
        for name, length in {"max_length": max_length, "teacher_max_length": teacher_max_length}.items():
            if not length >= 2:
                raise ValueError(f"`{name}` must be at least 2 (a token, and one to predict), got {length}.")
        self.student_tokenizer = student_tokenizer
        self.teacher_tokenizer = teacher_tokenizer
        self.max_length = max_length
        self.teacher_max_length = teacher_max_length

    def __call__(self, texts: Sequence[Text]) -> dict[str, Any]:
        """A batch for :class:`~lightning_distill.tasks.CausalLM` and ``OtherTokenizerTeacher``.

        Args:
            texts: Texts, or pairs of a prompt and its answer, of which only the answer gets labels.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels`` of the student, and under ``"teacher"`` the teacher's
            ``input_ids``, ``attention_mask`` and ``position``; padded on the right.
        """
        students, teachers, labels, positions = [], [], [], []
        for text in texts:
            prompt, answer = ("", text) if isinstance(text, str) else text
            ids, ends = _tokens(self.student_tokenizer, prompt + answer, self.max_length)
            teacher_ids, teacher_ends = _tokens(self.teacher_tokenizer, prompt + answer, self.teacher_max_length)
            learnt = [end == NOWHERE or end > len(prompt) for end in ends]
            students.append(ids)
            teachers.append(teacher_ids)
            labels.append([token if is_learnt else UNLABELLED for token, is_learnt in zip(ids, learnt, strict=True)])
            positions.append(aligned_positions(ends, teacher_ends))
        return {
            "input_ids": _stack(students, _padding(self.student_tokenizer)),
            "attention_mask": _mask(students),
            "labels": _stack(labels, UNLABELLED),
            "teacher": {
                "input_ids": _stack(teachers, _padding(self.teacher_tokenizer)),
                "attention_mask": _mask(teachers),
                "position": _stack(positions, NOWHERE),
            },
        }


def _tokens(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """Ids, and characters read after each; special tokens have read 0 at the beginning and are nowhere at the end."""
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ids, ends, begun = list(encoded["input_ids"]), [], False
    for (_, end), special in zip(encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True):
        begun = begun or not special
        ends.append(end if not special else NOWHERE if begun else 0)
    end_token = tokenizer.eos_token_id
    if end_token is not None and (not ids or ids[-1] != end_token):
        ids.append(end_token)
        ends.append(NOWHERE)
    return ids[:max_length], ends[:max_length]


def _padding(tokenizer: Any) -> int:
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _stack(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)


def _mask(rows: Sequence[Sequence[int]]) -> Tensor:
    return _stack([[1] * len(row) for row in rows], 0)
