"""Whether tokenizers, models and the length of their inputs go together."""

from __future__ import annotations

from typing import Any

from torch import nn

PROBE = "Hello,  World! It's 1234567 o'clock \u2014 d\u00e9j\u00e0 vu.\n\tdef f(x_1): return x_1\n"
"""A text on which tokenizers with equal vocabularies that cut differently disagree."""


def check_same_tokenizer(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Refuse tokenizers whose tokens mean different things: losses on logits compare token ``i`` with token ``i``.

    One may have tokens more than the other, such as special ones that were added to it.

    Args:
        student_tokenizer: A transformers tokenizer.
        teacher_tokenizer: The same.

    Raises:
        ValueError: If a number stands for different tokens, or the tokenizers cut a text differently; the message names
            the first differences.
    """
    student, teacher = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    differing = [i for i in sorted(student.keys() & teacher.keys()) if student[i] != teacher[i]]
    if differing:
        shown = "; ".join(f"{i} is {student.get(i)!r} and {teacher.get(i)!r}" for i in differing[:3])
        raise ValueError(
            f"Student and teacher have different tokenizers: of {len(student)} and {len(teacher)} tokens, "
            f"{len(differing)} differ, first {shown}. A loss on logits compares token by token. Give both one "
            "tokenizer, or use what needs none: `TwoTokenizers`, `OtherTokenizerTeacher` and `UniversalLogitDistance`."
        )
    first, second = (tokenizer(PROBE)["input_ids"] for tokenizer in (student_tokenizer, teacher_tokenizer))
    if first != second:
        at = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
        )
        names = student_tokenizer.convert_ids_to_tokens
        raise ValueError(
            f"Student and teacher have the same tokens but cut a text differently: {PROBE!r} into {len(first)} and "
            f"{len(second)} tokens, from token {at} on {names(first[at : at + 3])} and {names(second[at : at + 3])}. "
            "Use one tokenizer for both."
        )


def check_same_language(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse transformers models whose tokenizers, saved beside their weights, differ: both read one batch of tokens.

    Models without a tokenizer in their folder, or without a folder, are let through.

    Raises:
        ValueError: As :func:`check_same_tokenizer`.
    """
    if _name(student) == _name(teacher):
        return
    own, others = own_tokenizer(student), own_tokenizer(teacher)
    if own is not None and others is not None:
        check_same_tokenizer(own, others)


def check_reader(model: nn.Module, tokenizer: Any, length: int) -> None:
    """Refuse data for a model that has another tokenizer, or cannot read as many tokens.

    Args:
        model: A transformers model; any other is let through.
        tokenizer: That the data is made with.
        length: Of the sequences, tokens.

    Raises:
        ValueError: If the tokenizer saved beside the model differs from ``tokenizer``, or as :func:`check_context`.
    """
    check_context(model, length)
    own = own_tokenizer(model)
    if own is None or tokenizer.name_or_path == _name(model):
        return
    try:
        check_same_tokenizer(own, tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{_name(model)!r} has another tokenizer than the data. Give the data module `tokenizer={_name(model)!r}`. "
            f"Compared as student (the model) and teacher (the data): {error}"
        ) from None


def own_tokenizer(model: nn.Module) -> Any:
    """The tokenizer that was saved beside a transformers model; ``None`` if there is none on this machine."""
    from transformers import AutoTokenizer

    if not _name(model):
        return None
    try:
        found = AutoTokenizer.from_pretrained(_name(model), local_files_only=True)
        return found if found(PROBE)["input_ids"] else None  # without files, transformers makes one that reads nothing
    except (OSError, ValueError, KeyError, ImportError):  # none there, or one that needs a package
        return None


def check_context(model: nn.Module, length: int) -> None:
    """Refuse sequences that are longer than what a transformers model can read.

    Args:
        model: With ``config.max_position_embeddings``; any other is let through.
        length: Of the sequences, tokens.

    Raises:
        ValueError: If ``length`` is larger than the model's context.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if isinstance(context, int) and length > context:
        raise ValueError(
            f"Sequences of {length} tokens are longer than the context of {type(model).__name__}, {context} tokens. "
            f"Shorten them to {context}, or use a model with a longer context."
        )


def _name(model: nn.Module) -> str:
    """Where a transformers model was loaded from; empty if from nowhere."""
    name: str = getattr(getattr(model, "config", None), "name_or_path", "") or ""
    return name


def _tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens by their number."""
    return {number: token for token, number in tokenizer.get_vocab().items()}
