"""Whether two tokenizers, or a model and the length of its inputs, go together."""

from __future__ import annotations

from typing import Any

from torch import nn

PROBE = "Hello,  World! It's 1234567 o'clock \u2014 d\u00e9j\u00e0 vu.\n\tdef f(x_1): return x_1\n"
"""A text on which tokenizers with equal vocabularies that cut differently disagree."""


def check_same_tokenizer(student_tokenizer: Any, teacher_tokenizer: Any) -> None:
    """Refuse tokenizers whose tokens mean different things: losses on logits compare token ``i`` with token ``i``.

    Args:
        student_tokenizer: A transformers tokenizer.
        teacher_tokenizer: The same.

    Raises:
        ValueError: If the vocabularies differ, or the tokenizers cut a text differently; the message names the first
            differences.
    """
    student, teacher = _tokens(student_tokenizer), _tokens(teacher_tokenizer)
    differing = [i for i in sorted({*student, *teacher}) if student.get(i) != teacher.get(i)]
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


def _tokens(tokenizer: Any) -> dict[int, str]:
    """Tokens by their number."""
    return {number: token for token, number in tokenizer.get_vocab().items()}
