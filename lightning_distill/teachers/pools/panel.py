"""The teachers of a pool in front of one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.losses.soft_targets import softened_log_softmax
from lightning_distill.outputs import Outputs
from lightning_distill.tasks import Task
from lightning_distill.teachers.teacher import Teacher


class NothingToSayError(Exception):
    """A teacher of the pool has nothing to say about the batch."""


class PoolOutputs(Outputs):
    """What a pool said: the mixture of its teachers.

    Args:
        logits: Of the mixture, shape ``(B, C)``, without a graph.
        weights: Share of each teacher, shape ``(B, T)``; with a graph where a router is trained.
        members: Log-probabilities of each teacher, shape ``(T, B, C)``; means nothing where the share is 0.
        learned: Whether the shares come from a router that wants to be trained.
    """

    def __init__(self, logits: Tensor, *, weights: Tensor, members: Tensor, learned: bool) -> None:
        super().__init__(logits)
        self.weights = weights
        self.members = members
        self.learned = learned
        self.awaits_loss = learned


class Panel:
    """The teachers before one batch: each is run on the samples that it is asked about, and on each of them once.

    Attributes:
        size: Number of samples ``B``.
        labels: Of the batch, if there are any.
        index: Identity of each sample, shape ``(B,)``, if the batch has it.
        training: Whether this is a training step.
        runs: On how many samples each teacher was run so far.

    Args:
        teachers: Of the pool, by name.
        batch: As the student gets it.
        task: Reads it.
        training: See above.
    """

    def __init__(self, teachers: Mapping[str, Teacher], batch: Any, task: Task, *, training: bool) -> None:
        self.batch, self.task, self.training = batch, task, training
        self.size = task.batch_size(batch)
        self.device = task.inputs(batch).device
        self.labels = task.labels(batch)
        self.index = task.index(batch)
        self.runs = [0] * len(teachers)
        self._teachers = list(teachers.items())
        self._logits: list[Tensor | None] = [None] * len(teachers)
        self._asked: list[Tensor | None] = [None] * len(teachers)

    def __len__(self) -> int:
        return len(self._teachers)

    def logits(self, teacher: int, rows: Tensor | None = None) -> Tensor:
        """What the teacher at this place says about these samples, or all, shape ``(n, C)``.

        Raises:
            ValueError: If the logits have another number of classes than those of the others.
        """
        if self.runs[teacher] < self.size:
            self._run(teacher, rows)
        said = self._logits[teacher]
        assert said is not None
        return said if rows is None else said[rows]

    def log_probs(self, teacher: int, rows: Tensor | None = None) -> Tensor:
        """The same as log-probabilities, in float32 or wider."""
        return softened_log_softmax(self.logits(teacher, rows))

    def probs(self) -> Tensor:
        """Probabilities of all teachers about all samples, shape ``(T, B, C)``."""
        return torch.stack([self.log_probs(teacher) for teacher in range(len(self))]).exp()

    def mixture(self, weights: Tensor, *, learned: bool) -> PoolOutputs:
        """The teachers' mean with these shares, shape ``(B, T)``; a teacher is run where it has a share.

        Where one teacher has the whole share its logits stay as they are.
        """
        shares = weights.detach()
        for teacher in range(len(self)):
            if self.runs[teacher] < self.size:
                rows = shares[:, teacher].nonzero().squeeze(1)
                if len(rows) > 0:
                    self.logits(teacher, rows)
        known = next(said for said in self._logits if said is not None)
        raw = torch.stack([torch.zeros_like(known) if said is None else said for said in self._logits])
        members = softened_log_softmax(raw)
        mixed = (shares.T.unsqueeze(-1).log() + members).logsumexp(dim=0)
        alone, place = shares.max(dim=-1)
        single = raw[place, torch.arange(self.size, device=raw.device)]
        logits = torch.where((alone == 1).unsqueeze(-1), single, mixed)
        return PoolOutputs(logits, weights=weights, members=members, learned=learned)

    def _run(self, teacher: int, rows: Tensor | None) -> None:
        """Run a teacher on those of the samples that it was not run on."""
        asked = self._asked[teacher]
        if asked is None and (rows is None or len(rows) == self.size):
            missing = None
        else:
            rows = torch.arange(self.size, device=self.device) if rows is None else rows
            missing = rows if asked is None else rows[~asked[rows]]
            if len(missing) == 0:
                if asked is None:  # asked about no sample at all, and before everything else
                    raise ValueError("A teacher was asked about no sample; leave it out instead.")
                return
        said = self._ask(teacher, missing)
        count = self.size if missing is None else len(missing)
        if said.ndim != 2 or len(said) != count:
            raise ValueError(
                f"The teacher {self._teachers[teacher][0]!r} of the pool returned logits of shape {tuple(said.shape)} "
                f"for {count} samples; a pool needs one row of class scores per sample."
            )
        self.runs[teacher] += count
        if missing is None:
            self._logits[teacher] = said
            return
        table = self._logits[teacher]
        table = said.new_zeros(self.size, said.shape[-1]) if table is None else table
        self._logits[teacher] = table.index_copy(0, missing, said)
        asked = torch.zeros(self.size, dtype=torch.bool, device=self.device) if asked is None else asked
        self._asked[teacher] = asked.index_fill(0, missing, True)

    def _ask(self, teacher: int, rows: Tensor | None) -> Tensor:
        name, network = self._teachers[teacher]
        batch = self.batch if rows is None else take_rows(self.batch, rows, self.size)
        outputs = network(batch, self.task)
        if outputs is None:
            raise NothingToSayError(name)
        logits: Tensor = outputs.logits.detach()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def take_rows(batch: Any, rows: Tensor, size: int) -> Any:
    """Some of the samples of ``batch``: tensors, tuples and mappings of them, also nested.

    Args:
        batch: Whose samples lie along the first dimension.
        rows: Their places, shape ``(n,)``.
        size: How many samples the batch has; what has another length belongs to no sample and stays as it is.

    Example:
        >>> take_rows({"x": torch.arange(6).view(3, 2), "name": ["a", "b", "c"]}, torch.tensor([2, 0]), 3)
        {'x': tensor([[4, 5],
                [0, 1]]), 'name': ['c', 'a']}
    """
    if isinstance(batch, Tensor):
        return batch[rows.to(batch.device)] if batch.ndim > 0 and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows, size) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        if len(batch) == size and not any(isinstance(value, (Tensor, Mapping)) for value in batch):
            return [batch[row] for row in rows.tolist()]
        return [take_rows(value, rows, size) for value in batch]
    return batch
