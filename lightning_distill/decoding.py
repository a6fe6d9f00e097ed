"""What a language model would write, as training sets: its sequences, and its best candidates as soft labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_distill.compatibility import check_context
from lightning_distill.losses.targets import cross_entropy
from lightning_distill.modes import inference
from lightning_distill.nbest import nbest_weights
from lightning_distill.outputs import UNLABELLED
from lightning_distill.tasks import CausalLM

Strategy = Literal["greedy", "beam", "top_k"]
Prompt = Sequence[int] | Tensor | Mapping[str, Any]
Record = dict[str, Any]


class Decoded(NamedTuple):
    """Continuations that a model wrote.

    Attributes:
        sequences: Their tokens without the prompt, up to and with the end-of-sequence token, then ``-100``; shape
            ``(B, N, T)``, most probable first (samples: in the order drawn).
        log_scores: Log-probability of each under the model, nats, shape ``(B, N)``.
    """

    sequences: Tensor
    log_scores: Tensor


def decode(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    strategy: Strategy = "greedy",
    num: int = 4,
    max_new_tokens: int = 64,
    seed: int | None = None,
    **settings: Any,
) -> Decoded:
    """Let a transformers language model continue prompts.

    The model writes in eval mode; its own generation settings are not used, except for the special tokens.

    Args:
        model: With a ``generate`` method.
        inputs: ``input_ids`` and, where there is padding on either side, ``attention_mask``, both ``(B, P)``.
        strategy: ``"greedy"`` takes the most likely token; ``"beam"`` searches for the ``num`` most likely
            sequences; ``"top_k"`` draws ``num`` sequences, each token out of the ``top_k`` (50) most likely.
        num: Sequences per prompt; ``"greedy"`` always gives one.
        max_new_tokens: Length after which a sequence is cut.
        seed: Of the draws; the global random numbers then stay as they are. By default the global ones are used.
        **settings: Other fields of transformers' ``GenerationConfig``, such as ``top_k=20`` or ``temperature=0.7``.

    Returns:
        The sequences and their log-probabilities under the model as it is, whatever ``settings`` did to the search.

    Raises:
        TypeError: If ``model`` cannot generate.
        ValueError: If ``strategy`` is unknown, ``num`` or ``max_new_tokens`` is below 1, a prompt is empty, or a
            prompt and ``max_new_tokens`` together are longer than the model's context.
    """
    _check_decoding(model, strategy, num, max_new_tokens)
    import transformers

    ids, mask = _left_padded(inputs)
    check_context(model, int(mask.sum(dim=1).max()) + max_new_tokens)
    special: Any = model.generation_config
    config = {
        "do_sample": strategy == "top_k",
        "num_beams": num if strategy == "beam" else 1,
        "num_return_sequences": 1 if strategy == "greedy" else num,
        "max_new_tokens": max_new_tokens,
        "length_penalty": 0.0,  # the most probable sequences, as their log-probabilities order them
        "bos_token_id": special.bos_token_id,
        "eos_token_id": special.eos_token_id,
        "pad_token_id": special.pad_token_id if special.pad_token_id is not None else 0,
    }
    if strategy == "top_k":
        config |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
    config |= settings
    make_config: Any = transformers.GenerationConfig
    generate: Any = model.generate
    with inference(model), _seeded(seed, ids.device), _generation_config(model, make_config(**config)):
        said: Tensor = generate(input_ids=ids, attention_mask=mask.long())
        written = _until_end(said[:, ids.shape[1] :], config["eos_token_id"])
        rows = continued({"input_ids": ids, "attention_mask": mask}, written)
        log_scores = _log_probabilities(model, rows)
    sequences, log_scores = written.unflatten(0, (len(ids), -1)), log_scores.unflatten(0, (len(ids), -1))
    if strategy == "beam":
        log_scores, order = log_scores.sort(dim=-1, descending=True, stable=True)
        sequences = sequences.gather(1, order.unsqueeze(-1).expand_as(sequences))
    return Decoded(sequences, log_scores)


def continued(inputs: Mapping[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """Training rows of prompts and what follows them.

    Args:
        inputs: ``input_ids`` and, where there is padding on either side, ``attention_mask``, both ``(B, P)``.
        sequences: Tokens, shape ``(B * N, T)``, ``-100`` after their ends; the first ``N`` belong to the first prompt.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` (``-100`` in prompts and padding), padded on the right, all of
        shape ``(B * N, P + T)``.
    """
    ids, mask = inputs["input_ids"], _mask(inputs)
    repeats = len(sequences) // max(len(ids), 1)
    ids, mask = ids.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)
    written = sequences != UNLABELLED
    real = torch.cat([mask, written], dim=1)
    order = (~real).long().argsort(dim=1, stable=True)
    tokens = torch.cat([ids, sequences.clamp_min(0)], dim=1)
    labels = torch.cat([torch.full_like(ids, UNLABELLED), sequences], dim=1)
    tokens = torch.where(real, tokens, 0)
    return {
        "input_ids": tokens.gather(1, order),
        "attention_mask": real.gather(1, order).long(),
        "labels": labels.gather(1, order),
    }


def teacher_sequences(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    strategy: Strategy = "beam",
    num: int = 4,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    **settings: Any,
) -> list[Record]:
    r"""A training set of what a teacher writes: sequence-level distillation (Kim and Rush 2016, section 3.2).

    A student trained on it by plain cross-entropy minimises :math:`-\log p_S(\hat y)` with the teacher's best sequence
    :math:`\hat y`, the mode of the teacher's distribution over sequences, in place of the expectation over it. This is
    not what a divergence at each token does, and the two add up well (section 4). https://arxiv.org/abs/1606.07947.

    Args:
        model: The teacher: a transformers causal language model.
        prompts: Token ids, or mappings with ``input_ids``, of which only the prompt is used: where ``attention_mask``
            is not 0 and ``labels``, if there are any, are ``-100``.
        strategy: See :func:`decode`. Of ``"beam"`` the best sequence is kept, of ``"top_k"`` all samples.
        num: Beams, or samples per prompt.
        max_new_tokens: Length after which a sequence is cut.
        batch_size: Prompts at a time.
        seed: Of the samples.
        **settings: See :func:`decode`.

    Returns:
        One record per sequence: ``input_ids`` and ``labels``, with the prompt at ``-100``, both ``(L,)``, on the CPU.
        Batch them with :func:`collate`.

    Raises:
        TypeError: If ``model`` cannot generate.
        ValueError: If a prompt is empty, or as in :func:`decode`.
    """
    records = []
    arguments = {"strategy": strategy, "num": num, "max_new_tokens": max_new_tokens, "seed": seed, **settings}
    for inputs, decoded in _decoded(model, prompts, batch_size, arguments):
        kept = decoded.sequences if strategy == "top_k" else decoded.sequences[:, :1]
        records += _records(continued(inputs, kept.flatten(0, 1)))
    return records


def teacher_nbest(
    model: nn.Module,
    prompts: Iterable[Prompt],
    *,
    strategy: Strategy = "beam",
    num: int = 4,
    tau: float | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    **settings: Any,
) -> list[Record]:
    """A training set of a model's best sequences, with its other candidates as soft labels.

    It is for :class:`~lightning_distill.nbest.NBestTargets`.

    Args:
        model: The teacher, or the student itself before it is trained further.
        prompts: See :func:`teacher_sequences`.
        strategy: See :func:`decode`.
        num: Candidates per prompt.
        tau: Softens the weights of the candidates, see :func:`~lightning_distill.nbest.nbest_weights`. By default 1,
            and ``math.inf`` for ``"top_k"``, whose samples come in proportion to their probabilities already.
        max_new_tokens: Length after which a candidate is cut.
        batch_size: Prompts at a time.
        seed: Of the samples.
        **settings: See :func:`decode`.

    Returns:
        Records of :func:`teacher_sequences` (one per prompt: the best candidate, or the first sample) with
        ``targets``: ``tokens``, shape ``(N, L)``, aligned with ``input_ids`` and ``-100`` in the prompt; ``weights``,
        shape ``(N,)``.

    Raises:
        TypeError: If ``model`` cannot generate.
        ValueError: If ``tau`` is not positive, or as in :func:`teacher_sequences`.
    """
    tau = (math.inf if strategy == "top_k" else 1.0) if tau is None else tau
    records = []
    arguments = {"strategy": strategy, "num": num, "max_new_tokens": max_new_tokens, "seed": seed, **settings}
    for inputs, decoded in _decoded(model, prompts, batch_size, arguments):
        weights = nbest_weights(decoded.log_scores, tau=tau).cpu()
        best = _records(continued(inputs, decoded.sequences[:, 0]))
        for record, candidates, of_candidates in zip(best, decoded.sequences.cpu(), weights, strict=True):
            length = int((record["labels"] != UNLABELLED).sum())  # beyond it, no candidate can have begun in this way
            tokens = torch.full((len(candidates), len(record["labels"])), UNLABELLED)
            tokens[:, len(record["labels"]) - length :] = candidates[:, :length]
            records.append(record | {"targets": {"tokens": tokens, "weights": of_candidates}})
    return records


def collate(records: Sequence[Record], *, pad_token_id: int = 0) -> dict[str, Any]:
    """A batch of records of different lengths, padded on the right: the ``collate_fn`` of a loader.

    Args:
        records: As :func:`teacher_sequences` or :func:`teacher_nbest` make them.
        pad_token_id: Stands in ``input_ids`` where there is padding; which token is the same to the result.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, shape ``(B, T)``; and ``targets``, if the records have any.
    """
    ids = [record["input_ids"] for record in records]
    batch: dict[str, Any] = {
        "input_ids": _stacked(ids, pad_token_id),
        "attention_mask": _stacked([torch.ones_like(row) for row in ids], 0),
        "labels": _stacked([record["labels"] for record in records], UNLABELLED),
    }
    if "targets" in records[0]:
        tokens = [record["targets"]["tokens"].T for record in records]
        weights = torch.stack([record["targets"]["weights"] for record in records])
        batch["targets"] = {"tokens": _stacked(tokens, UNLABELLED).transpose(-1, -2), "weights": weights}
    return batch


def _decoded(
    model: nn.Module, prompts: Iterable[Prompt], batch_size: int, arguments: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Tensor], Decoded]]:
    """Batches of prompts and what the model made of them."""
    if not batch_size >= 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    device = next(model.parameters()).device
    tokens = [_prompt_tokens(prompt, number) for number, prompt in enumerate(prompts)]
    for start in range(0, len(tokens), batch_size):
        rows = tokens[start : start + batch_size]
        inputs = {
            "input_ids": _stacked(rows, 0).to(device),
            "attention_mask": _stacked([torch.ones_like(row) for row in rows], 0).to(device),
        }
        seed = arguments["seed"]  # of another batch, other draws
        yield inputs, decode(model, inputs, **dict(arguments) | {"seed": None if seed is None else seed + start})


def _prompt_tokens(prompt: Prompt, number: int) -> Tensor:
    if isinstance(prompt, Mapping):
        ids = torch.as_tensor(prompt["input_ids"])
        keep = torch.ones_like(ids, dtype=torch.bool)
        if prompt.get("attention_mask") is not None:
            keep &= torch.as_tensor(prompt["attention_mask"]).bool()
        if prompt.get("labels") is not None:
            keep &= torch.as_tensor(prompt["labels"]) == UNLABELLED
        ids = ids[keep]
    else:
        ids = torch.as_tensor(prompt)
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(
            f"Prompt {number} must be token ids of shape (P,), got {ids.dtype} of shape {tuple(ids.shape)}. Tokenize "
            "one prompt at a time."
        )
    if len(ids) == 0:
        raise ValueError(
            f"Prompt {number} is empty. Begin it with the tokenizer's bos token; in a mapping with `labels`, the "
            f"prompt is what they mark with {UNLABELLED}."
        )
    return ids.long()


def _check_decoding(model: nn.Module, strategy: str, num: int, max_new_tokens: int) -> None:
    if not callable(getattr(model, "generate", None)) or getattr(model, "generation_config", None) is None:
        raise TypeError(
            f"`model` must be a transformers model that can generate, got {type(model).__name__}. Load it with "
            "`AutoModelForCausalLM`."
        )
    if strategy not in ("greedy", "beam", "top_k"):
        raise ValueError(f"`strategy` must be 'greedy', 'beam' or 'top_k', got {strategy!r}.")
    for name, value in {"num": num, "max_new_tokens": max_new_tokens}.items():
        if not value >= 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")


def _log_probabilities(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """Log-probability of the labelled part of each row, shape of the rows."""
    task = CausalLM()
    outputs, labels = task.run(model, rows), task.labels(rows)
    assert labels is not None
    surprise = torch.cat([cross_entropy(logits, labels[part]) for part, logits in outputs.chunks()])
    row_of_item = task.counts(rows).nonzero()[:, 0]
    return -surprise.new_zeros(len(rows["labels"])).index_add(0, row_of_item, surprise)


def _until_end(sequences: Tensor, end: int | list[int] | None) -> Tensor:
    """``sequences`` with ``-100`` after the first end-of-sequence token."""
    if end is None:
        return sequences
    ends = torch.isin(sequences, torch.tensor(end, device=sequences.device)).long()
    return sequences.masked_fill(ends.cumsum(dim=1) - ends > 0, UNLABELLED)


def _left_padded(inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and mask with all padding on the left, where generation needs it."""
    mask = _mask(inputs)
    if not mask.any(dim=1).all():
        raise ValueError("A prompt is empty: its `attention_mask` is 0 throughout. Begin it with the bos token.")
    order = mask.long().argsort(dim=1, stable=True)
    return inputs["input_ids"].gather(1, order), mask.gather(1, order)


def _mask(inputs: Mapping[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _records(rows: Mapping[str, Tensor]) -> list[Record]:
    lengths = rows["attention_mask"].sum(dim=1).tolist()
    return [
        {"input_ids": ids[:length].cpu().clone(), "labels": labels[:length].cpu().clone()}
        for ids, labels, length in zip(rows["input_ids"], rows["labels"], lengths, strict=True)
    ]


def _stacked(rows: Sequence[Tensor], padding: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)


@contextmanager
def _generation_config(model: Any, config: Any) -> Iterator[None]:
    """``config`` in place of the model's own, from which `generate` would otherwise fill what is at its default."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _seeded(seed: int | None, device: torch.device) -> Any:
    """Random numbers from ``seed`` for a while; as they are without one."""
    return nullcontext() if seed is None else _forked(seed, device)


@contextmanager
def _forked(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
