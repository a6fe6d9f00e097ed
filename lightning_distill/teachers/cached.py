"""What a teacher said earlier."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distill.outputs import Outputs
from lightning_distill.tasks import CausalLM, Task
from lightning_distill.teachers.cache import CacheReader, input_signature, read_head, same_input
from lightning_distill.teachers.frozen import FrozenTeacher
from lightning_distill.teachers.teacher import Teacher
from lightning_distill.top_k import TopK


class CachedTeacher(Teacher):
    """A teacher that was run before: reads what :class:`~lightning_distill.callbacks.CacheWriter` wrote.

    Samples are found by the batch's ``index``, so their order, the batch size and the number of processes do not
    matter. By the kind of the cache, loss terms see

    * ``"dense"``: the teacher's logits;
    * ``"hidden"``: its last hidden states and its output layer, which is stored beside them: the very logits, in a
      fraction of the space;
    * ``"top_k"``: the largest logits and the mass of the others, for
      :class:`~lightning_distill.losses.TopKTargets` and :class:`~lightning_distill.losses.SparseKD`.

    For :class:`~lightning_distill.tasks.CausalLM` a cache holds the tokens that counted when it was written (labelled
    ones that are no padding, or all that are no padding with ``distill_prompt=True``), so training must mask the same
    ones; padding may differ.

    Outside training, batches that are not in the cache (a validation set) have no teacher: the losses and the agreement
    with it are not measured there.

    Args:
        folder: Where the cache is.
        teacher: What the cache must be of: what ``CacheWriter`` was given, or
            :func:`~lightning_distill.teachers.teacher_fingerprint`; ``None`` for any.
        data: The same for the data set, :func:`~lightning_distill.teachers.data_fingerprint`; ``None`` for any.
        transform_seed: Seed of the random transforms that the teacher must have seen; ``None`` for any.
        same_inputs: Whether each sample must look as it did to the teacher. It finds other data sets and ids, random
            transforms and mixup that the teacher has not seen. Switch it off only where that is meant; consistent
            inputs teach better (Beyer et al. 2022, https://arxiv.org/abs/2106.05237).
        verify: Whether to compare all files with their checksums now; the first process of each machine does it.

    Attributes:
        spec: What the cache holds.

    Raises:
        FileNotFoundError: If there is no cache in ``folder``.
        ValueError: If the cache is damaged, empty, or of something else than asked for.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        teacher: str | None = None,
        data: str | None = None,
        transform_seed: int | None = None,
        same_inputs: bool = True,
        verify: bool = True,
    ) -> None:
        super().__init__()
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        self._reader = CacheReader(
            folder, verify=verify and first, teacher=teacher, data=data, transform_seed=transform_seed
        )
        self.spec = self._reader.spec
        self.same_inputs = same_inputs
        # Hidden from checkpoints and optimizers, as every frozen network.
        self._head = FrozenTeacher(read_head(Path(folder), self.spec.width)) if self.spec.kind == "hidden" else None

    @torch.no_grad()
    def forward(self, batch: Any, task: Task) -> Outputs | None:
        """What the teacher said about ``batch``; ``None`` if it is not in the cache and this is no training.

        Raises:
            ValueError: If the batch has no index, is not in the cache, looks otherwise than it did to the teacher, or
                other tokens count.
        """
        if not self.training and not self._holds(batch, task):
            return None
        index = sample_index(batch, task).cpu()
        said = self._reader.read(index)
        if self.same_inputs:
            self._check_inputs(batch, task, index)
        if self.spec.sequences:
            said = self._arranged(said, index, rows_per_sample(batch, task))
        device = task.inputs(batch).device
        if isinstance(said, TopK):
            ids, deltas, tail = (plane.to(device) for plane in said[:3])
            return Outputs(top_k=TopK(ids, deltas, tail, said.temperatures, said.classes))
        if self._head is None:
            return Outputs(said.to(device))
        weight: Any = self._head.network.weight
        return Outputs(hidden=said.to(device, weight.dtype), head=self._head.network)

    def _holds(self, batch: Any, task: Task) -> bool:
        """Whether these samples are in the cache, and not others that go by the same numbers."""
        index = task.index(batch)
        if index is None or not self._reader.holds(index):
            return False
        return not self.same_inputs or bool(self._agree(batch, task, index.cpu()).all())

    def _agree(self, batch: Any, task: Task, index: Tensor) -> Tensor:
        return same_input(self._reader.signatures(index), signature_of(batch, task).cpu())

    def _check_inputs(self, batch: Any, task: Task, index: Tensor) -> None:
        agree = self._agree(batch, task, index)
        if not agree.all():
            raise ValueError(
                f"{int((~agree).sum())} of {len(index)} samples, the first being sample {int(index[~agree][0])}, do "
                f"not look as they did to the teacher of the cache {self._reader.folder}. Is it of another data set or "
                "tokenizer, or are there random transforms (or a `batch_transform`) that the teacher has not seen? "
                "Write a cache of these very inputs; if the teacher is meant to see others, pass `same_inputs=False`."
            )

    def _arranged(self, said: TopK | Tensor, index: Tensor, lengths: Tensor | None) -> TopK | Tensor:
        """Rows of sequences in the shape of the student's items."""
        stored = self._reader.lengths(index)
        if lengths is not None:  # tokens that count stand one after the other, as in the cache
            lengths = lengths.cpu()
            if not torch.equal(stored, lengths):
                row = int((stored != lengths).nonzero()[0])
                raise ValueError(
                    f"Sample {int(index[row])} has {int(lengths[row])} tokens that count, but {int(stored[row])} in "
                    f"the teacher cache {self._reader.folder}. Use the tokenizer, truncation, labels and "
                    "`distill_prompt` that it was written with, or write it again."
                )
            return said
        if not (stored == stored[0]).all():
            raise ValueError(
                f"The teacher cache {self._reader.folder} holds sequences of different lengths, from "
                f"{int(stored.min())} to {int(stored.max())} in this batch, which the task cannot arrange. Use the "
                "task that it was written with (`CausalLM`), or sequences of one length."
            )
        if isinstance(said, TopK):
            ids, deltas, tail = (plane.unflatten(0, (len(index), -1)) for plane in said[:3])
            return TopK(ids, deltas, tail, said.temperatures, said.classes)
        rows: Tensor = said.unflatten(0, (len(index), -1))
        return rows


def sample_index(batch: Any, task: Task) -> Tensor:
    """Identity of each sample of ``batch`` in its data set, shape ``(B,)``.

    Raises:
        ValueError: If the batch does not have it, or not for each sample.
    """
    index = task.index(batch)
    if index is None:
        raise ValueError(
            "The batch has no `index`, by which a teacher cache finds its samples. Use a data module of "
            "`lightning_distill.datamodules`, or add each sample's position in the data set: as the third entry of "
            'tuples `(inputs, labels, index)`, or under the key `"index"`. A `batch_transform` that makes '
            "new samples, such as mixup, takes it away: they need the teacher itself."
        )
    if len(index) != (size := task.batch_size(batch)):
        raise ValueError(f"The batch's `index` has {len(index)} entries for {size} samples; each sample needs one.")
    return index


def rows_per_sample(batch: Any, task: Task) -> Tensor | None:
    """How many of each sample's tokens count, shape ``(B,)``; ``None`` where outputs are not tokens without padding."""
    return task.counts(batch).sum(dim=1) if isinstance(task, CausalLM) else None


def signature_of(batch: Any, task: Task) -> Tensor:
    """:func:`input_signature` of each sample of ``batch``, padding left out."""
    inputs = task.inputs(batch)
    mask = batch["attention_mask"] if isinstance(batch, dict) and "attention_mask" in batch else None
    return input_signature(inputs, mask)
