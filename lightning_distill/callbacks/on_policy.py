"""Teach the student on what it writes itself."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_distill.modes import inference
from lightning_distill.outputs import UNLABELLED
from lightning_distill.sharding import is_sharded
from lightning_distill.teachers import CachedTeacher


def generated_batch(
    student: nn.Module,
    batch: Mapping[str, Any],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    min_prompt: int = 1,
    vocabulary: int | None = None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """The prompts of ``batch``, continued by ``student``.

    Tokens are sampled from the student's whole softened distribution, whatever its ``generation_config`` prefers
    (top-k, top-p, repetition penalties), in eval mode, with a key-value cache. A row ends with its first
    end-of-sequence token.

    Args:
        student: A transformers causal language model, also under a PEFT adapter.
        batch: ``input_ids``, and where there are, ``attention_mask`` and ``labels``, all ``(B, T)``. The prompt of a
            row is what comes before its first labelled token; a row without labels is a prompt as a whole.
        max_new_tokens: Longest continuation; less if the student's context ends before.
        temperature: Of the sampling, positive; not that of the distillation.
        min_prompt: Tokens at the beginning of a row that are prompt even if they have labels; at least 1. Without
            ``labels`` they are the prompt.
        vocabulary: True size of a padded vocabulary: tokens from there on are not sampled. Needed where the teacher's
            padding is smaller than the student's.
        seed: Makes the sampling a function of its arguments and leaves torch's generators alone; ``None`` draws from
            them.

    Returns:
        ``input_ids``, ``attention_mask``, ``labels`` (all ``-100``: what the student wrote is no truth) and
        ``distill_mask`` (the generated tokens), all ``(B, T')``, padded on the right; and the ``index`` of the samples
        that the prompts are of, if there is one. Nothing else of ``batch`` is kept: it would not be about these tokens.

    Raises:
        ValueError: If an argument is outside its range, a row has no tokens, or a prompt fills the student's context.
    """
    _check(max_new_tokens=max_new_tokens, min_prompt=min_prompt, temperature=temperature, vocabulary=vocabulary)
    network: Any = student
    ids: Tensor = batch["input_ids"]
    prompt = prompt_mask(batch, min_prompt=min_prompt)
    if not prompt.any(dim=1).all():
        raise ValueError("A row of the batch has no tokens (`attention_mask` is 0 all along), so nothing to continue.")
    ends = _end_tokens(network)
    padding = network.generation_config.pad_token_id
    padding = padding if padding is not None else (ends[0] if ends else 0)
    prompts, real = _pad(ids, prompt, padding=padding, left=True)  # so that all continue in the same column
    room = _context(network) - prompts.shape[1]
    if is_sharded(network):  # all processes go on until the last has finished, and none may leave its context
        room = _least_of_all_processes(room, ids.device)
    if room < 1:
        raise ValueError(
            f"The longest prompt has {prompts.shape[1]} tokens and the student's context {_context(network)}: there is "
            "no room for a continuation. Cut the prompts."
        )
    with inference(network), _seeded(seed, ids.device):
        sequences: Tensor = network.generate(
            input_ids=prompts,
            attention_mask=real.long(),
            synced_gpus=is_sharded(network),  # whose forward passes all processes must take part in
            generation_config=_sampling(
                network, ends, padding, temperature, min(max_new_tokens, room), prompts.shape[1], vocabulary
            ),
        )
    continuation = sequences[:, prompts.shape[1] :]
    written = _until_end(continuation, ends)
    tokens, keep = torch.cat([prompts, continuation], dim=1), torch.cat([real, written], dim=1)
    generated = torch.cat([torch.zeros_like(real), written], dim=1)
    # Back to padding on the right: without position ids, models count positions from the first column.
    input_ids, attention_mask = _pad(tokens, keep, padding=padding)
    distill_mask, _ = _pad(generated, keep, padding=False)
    written_batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask.long(),
        "labels": torch.full_like(input_ids, UNLABELLED),
        "distill_mask": distill_mask,
    }
    return written_batch | ({"index": batch["index"]} if "index" in batch else {})


def prompt_mask(batch: Mapping[str, Any], *, min_prompt: int = 1) -> Tensor:
    """Which tokens of ``batch`` are its prompts, boolean, shape ``(B, T)``; see :func:`generated_batch`.

    Example:
        >>> labels = torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, -100]])
        >>> prompt_mask({"input_ids": torch.ones(2, 4), "labels": labels}).int()
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    ids: Tensor = batch["input_ids"]
    padding = batch.get("attention_mask")
    real = padding.bool() if padding is not None else torch.ones_like(ids).bool()
    first = real.cumsum(dim=1) <= min_prompt
    if "labels" not in batch:
        return real & first
    labelled = (batch["labels"] != UNLABELLED) & real
    prompt: Tensor = real & (first | (labelled.cumsum(dim=1) == 0))
    return prompt


class OnPolicy(L.Callback):
    """Replace a share of the training batches by the student's own continuations of their prompts (GKD).

    The teacher then judges what the student really writes, its mistakes included, which texts written by others never
    show it: Agarwal et al. (2024), https://arxiv.org/abs/2306.13649. Terms on labels are silent about generated tokens;
    terms on the teacher count them alone. The paper combines it with ``SoftTargets`` of any ``beta``.

    Whether a batch is generated, and what, depends on ``seed``, the optimizer step, the micro-batch and (what only) the
    process: a resumed run writes what the uninterrupted one would have, and all processes of a step do the same kind of
    work. Strategies that give each process a whole student (single device, DDP) and ``ModelParallelStrategy`` can be
    used; under the latter all processes write as many tokens at most as the longest prompt of any leaves room for.

    A generated row keeps the ``index`` of the sample that its prompt is of. A teacher's cache knows nothing of what the
    student will write, and is refused.

    Args:
        lmbda: Share of generated batches, in [0, 1].
        max_new_tokens: See :func:`generated_batch`, as for the following.
        temperature: Of the sampling; the paper uses 1.
        min_prompt: Tokens that are prompt at least.
        vocabulary: True size of a padded vocabulary.
        seed: Of the choice of batches and of the sampling.

    Raises:
        ValueError: If an argument is outside its range; at the start of the training, if the teacher is a cache.
        TypeError: At the start of the training, if the module has no ``batch_transform`` or its student cannot
            ``generate``.
    """

    def __init__(
        self,
        lmbda: float = 0.5,
        *,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        min_prompt: int = 1,
        vocabulary: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 <= lmbda <= 1:
            raise ValueError(f"`lmbda`, the share of generated batches, must be in [0, 1], got {lmbda}.")
        _check(max_new_tokens=max_new_tokens, min_prompt=min_prompt, temperature=temperature, vocabulary=vocabulary)
        self.lmbda = lmbda
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.min_prompt = min_prompt
        self.vocabulary = vocabulary
        self.seed = seed
        self._others: Callable[[Any], Any] | None = None
        self._own: Callable[[Any], Any] | None = None
        self._position = (-1, 0)

    def generates(self, step: int, micro_batch: int = 0) -> bool:
        """Whether micro-batch ``micro_batch`` of optimizer step ``step`` is generated; the same in every process."""
        return random.Random(f"{self.seed}-{step}-{micro_batch}").random() < self.lmbda

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Become the module's ``batch_transform``, after one that it has already."""
        student = getattr(pl_module, "student", None)
        if not hasattr(pl_module, "batch_transform") or not callable(getattr(student, "generate", None)):
            raise TypeError(
                f"OnPolicy needs a DistillationModule whose student can `generate` text, got "
                f"{type(pl_module).__name__} with a student of type {type(student).__name__}. Use a transformers "
                "causal language model with `task=CausalLM()`, or remove the callback."
            )
        if self.lmbda > 0 and isinstance(getattr(pl_module, "teacher", None), CachedTeacher):
            raise ValueError(
                "The teacher is a cache, which holds what it said about given texts; it cannot judge what the student "
                "writes. Pass the teacher's network, or remove the OnPolicy callback."
            )
        self._others = pl_module.batch_transform  # type: ignore[assignment]
        self._position = (-1, 0)

        def transform(batch: Any) -> Any:
            return self._transform(batch, trainer, pl_module)

        self._own = transform
        pl_module.batch_transform = transform  # type: ignore[assignment]

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module its own ``batch_transform`` back."""
        if self._own is not None and getattr(pl_module, "batch_transform", None) is self._own:
            pl_module.batch_transform = self._others  # type: ignore[assignment]
        self._own = self._others = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the module its own ``batch_transform`` back."""
        self.on_fit_end(trainer, pl_module)

    def _transform(self, batch: Any, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        batch = self._others(batch) if self._others is not None else batch
        step, micro_batch = trainer.global_step, 0
        if self._position[0] == step:
            micro_batch = self._position[1] + 1
        self._position = (step, micro_batch)
        if not self.generates(step, micro_batch):
            return batch
        of_this_process = random.Random(f"{self.seed}-{step}-{micro_batch}-{trainer.global_rank}")
        student = pl_module.student
        assert isinstance(student, nn.Module)
        return generated_batch(
            student,
            batch,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            min_prompt=self.min_prompt,
            vocabulary=self.vocabulary,
            seed=of_this_process.getrandbits(63),
        )


def _check(*, max_new_tokens: int, min_prompt: int, temperature: float, vocabulary: int | None) -> None:
    for name, value in {"max_new_tokens": max_new_tokens, "min_prompt": min_prompt, "vocabulary": vocabulary}.items():
        if value is not None and not value >= 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"`temperature` of the sampling must be positive and finite, got {temperature}.")


def _least_of_all_processes(number: int, device: torch.device) -> int:
    least = torch.tensor(number, device=device)
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
    return int(least)


def _end_tokens(network: Any) -> list[int]:
    ends = network.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _context(network: Any) -> int:
    return getattr(network.config, "max_position_embeddings", None) or 2**31


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Within this context torch's generators start from ``seed``; after it they are where they were before."""
    if seed is None:
        yield
        return
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng(devices=[] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.manual_seed(seed)
        yield


def _sampling(
    network: Any, ends: list[int], padding: int, temperature: float, new: int, prompt: int, vocabulary: int | None
) -> Any:
    """Plain sampling. Every setting is spelled out: what is left open comes from the network's preferences."""
    from transformers import GenerationConfig

    size = network.get_output_embeddings().weight.shape[0]
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=temperature,
        max_new_tokens=new,
        max_length=prompt + new,
        min_length=0,
        num_beams=1,
        num_return_sequences=1,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=padding,
        suppress_tokens=list(range(vocabulary, size)) if vocabulary is not None else [],
    )


def _until_end(tokens: Tensor, ends: list[int]) -> Tensor:
    """Which of ``tokens`` come not after the first of ``ends`` in their row, boolean, the same shape."""
    is_end = torch.isin(tokens, torch.tensor(ends, dtype=tokens.dtype, device=tokens.device))
    return is_end.cumsum(dim=1) - is_end.long() == 0


def _pad(values: Tensor, keep: Tensor, *, padding: int | bool, left: bool = False) -> tuple[Tensor, Tensor]:
    """The ``keep`` part of each row of ``values`` pushed to one side, and which of the result are no padding."""
    lengths = keep.sum(dim=1, keepdim=True)
    width = int(lengths.max())
    columns = keep.cumsum(dim=1) - 1 + (width - lengths if left else 0)
    rows = torch.arange(len(keep), device=keep.device).unsqueeze(1).expand_as(keep)
    result = values.new_full((len(keep), width), padding)
    real = keep.new_zeros(len(keep), width)
    result[rows[keep], columns[keep]] = values[keep]
    real[rows[keep], columns[keep]] = True
    return result, real
