"""A teacher that reads the same text in other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.outputs import Outputs
from lightning_distill.tasks import CausalLM, Task
from lightning_distill.teachers.frozen import FrozenTeacher


class OtherTokenizerTeacher(FrozenTeacher):
    """A frozen causal language model with another tokenizer than the student's.

    The batch comes from :class:`~lightning_distill.datamodules.TwoTokenizers`: beside the student's tokens it holds,
    under ``"teacher"``, the teacher's ``input_ids`` and ``attention_mask``, ``(B, T_t)``, and ``position``,
    ``(B, T_s)``: for each of the student's tokens the index of the teacher's token up to which both have read the same
    text, or -1.

    The outputs are about ``m`` of the ``n`` tokens of the student that count: those with such a position.
    ``Outputs.features["aligned"]``, boolean, ``(n,)``, tells which. Use it with
    :class:`~lightning_distill.losses.UniversalLogitDistance`.

    Args:
        network: A transformers causal language model; frozen in place.
        dtype: See :class:`FrozenTeacher`.
    """

    def attach(self, student: nn.Module) -> None:
        """Any student will do: it reads tokens of its own."""

    @torch.no_grad()
    def forward(self, batch: Any, task: Task) -> Outputs:
        """What the network says at the positions that it shares with the student.

        Raises:
            TypeError: If ``task`` is no :class:`~lightning_distill.tasks.CausalLM`.
            ValueError: If the batch has no tokens of the teacher.
        """
        if not isinstance(task, CausalLM):
            raise TypeError(f"{type(self).__name__} needs `task=CausalLM()`, got {type(task).__name__}.")
        own = batch.get("teacher") if isinstance(batch, Mapping) else None
        if not isinstance(own, Mapping):
            found = f"only {list(batch)}" if isinstance(batch, Mapping) else f"it is a {type(batch).__name__}"
            raise ValueError(
                f"The batch has no tokens of the teacher under 'teacher': {found}. Collate texts with "
                "`TwoTokenizers(student_tokenizer, teacher_tokenizer)`. (Text that the student generated, as by "
                "`OnPolicy`, has none: it cannot be combined with another tokenizer.)"
            )
        read = {"input_ids": own["input_ids"], "attention_mask": own["attention_mask"]}
        said = super().forward(read, task)
        aligned, rows = _rows(own["position"], task.counts(batch), task.counts(read))
        features = said.features | {"aligned": aligned}
        if said.hidden is not None:
            return Outputs(hidden=said.hidden[rows], head=said.head, features=features)
        return Outputs(said.logits[rows], features=features)


def _rows(position: Tensor, counts: Tensor, teacher_counts: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the student's counting tokens have a partner, ``(n,)``, and the rows of these partners, ``(m,)``.

    The teacher's outputs have one row per true value of ``teacher_counts``, ``(B, T_t - 1)``.
    """
    wanted = position[:, :-1][counts]
    sample = torch.arange(len(counts), device=counts.device).unsqueeze(1).expand_as(counts)[counts]
    row_of = (teacher_counts.flatten().cumsum(dim=0) - 1).view_as(teacher_counts)
    row_of = row_of.masked_fill(~teacher_counts, -1)
    reachable = (wanted >= 0) & (wanted < row_of.shape[1])  # the last token has no next one, and no row
    rows = torch.full_like(wanted, -1)
    rows[reachable] = row_of[sample[reachable], wanted[reachable]]
    aligned = rows >= 0
    return aligned, rows[aligned]
