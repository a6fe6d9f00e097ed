"""Choices among teachers that are remembered by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_distill.losses.ranks import gather_rows, world_size
from lightning_distill.teachers.pools.choices import Choice, Member
from lightning_distill.teachers.pools.panel import Panel


class CachedChoice(Choice):
    """Another choice, made once per training sample and remembered by the batch's ``index``.

    From the second epoch on only the teachers that have a share are run, also where the choice itself runs all of them
    (:class:`ScoredChoice`, :class:`CascadeChoice`). If one sample of a batch is new, the choice is made for the whole
    batch again, and what is remembered of the others stays. Outside training nothing is remembered.

    After each training batch the processes tell each other what they have decided, so that all remember the same,
    wherever a sample comes next. The shares are in checkpoints, and a resumed run goes on exactly.

    Args:
        choice: Makes the decisions; not a router, whose decisions are trained.
        max_uses: How often a decision is used before it is made again; ``None`` for ever. At least 1.

    Raises:
        ValueError: If ``choice`` is trained or ``max_uses`` is not positive; when called in training, if the batch
            has no index or a negative one; when loaded, if the decisions are about another pool.
    """

    def __init__(self, choice: Choice, max_uses: int | None = None) -> None:
        super().__init__()
        if choice.learned:
            raise ValueError(
                f"`choice` is a {type(choice).__name__}, which is trained: its decisions change. Use it alone."
            )
        if max_uses is not None and max_uses < 1:
            raise ValueError(f"`max_uses` must be None or at least 1, got {max_uses}.")
        self.choice = choice
        self.max_uses = max_uses
        self._shares = torch.zeros(0, 0)  # by index; on the CPU, as a data set may be large
        self._uses = torch.zeros(0, dtype=torch.int64)  # 0: unknown
        self._names: list[str] = []
        self._untold: list[Tensor] = []  # samples that other processes do not know of yet
        self._device = torch.device("cpu")

    def bind(self, members: Sequence[Member]) -> None:
        """Tell the choice."""
        self.choice.bind(members)
        self._shares = torch.zeros(0, len(members))
        self._names = [member.name for member in members]

    @property
    def remembered(self) -> int:
        """For how many samples there is a decision."""
        return int((self._uses > 0).sum())

    def forward(self, panel: Panel) -> Tensor:
        """Shares: remembered, or made now."""
        if not panel.training:
            return self.choice(panel)  # type: ignore[no-any-return]
        if panel.index is None:
            raise ValueError(
                "The batch has no `index`, by which decisions are remembered. Use a data module of "
                "`lightning_distill.datamodules`, or add each sample's position in the data set: a third entry of "
                'tuples, or the key "index".'
            )
        index = panel.index.cpu()
        if (least := int(index.min())) < 0:
            raise ValueError(
                f"`index` must not be negative, got {least}: decisions are remembered by each sample's position in the "
                "data set."
            )
        self._grow(int(index.max()) + 1)
        due = self._uses[index] == 0
        if self.max_uses is not None:
            due |= self._uses[index] > self.max_uses
        if due.any():
            made = self.choice(panel).cpu()
            self._shares[index[due]] = made[due]
            self._uses[index[due]] = 1
        self._uses[index] += 1
        if world_size() > 1:
            self._untold.append(index)
            self._device = panel.device  # where the processes can talk
        return self._shares[index].to(panel.device)

    def share(self) -> None:
        """Take over what the other processes have decided; of two about one sample the last one's holds everywhere."""
        if world_size() == 1:
            return
        told = torch.cat([torch.zeros(0, dtype=torch.int64), *self._untold]).unique()
        self._untold.clear()
        columns = [told[:, None], self._uses[told, None], self._shares[told]]
        own = torch.cat([column.double() for column in columns], dim=1)  # in which integers are exact
        rows = gather_rows(own.to(self._device))[0].cpu()
        if len(rows) == 0:
            return
        index = rows[:, 0].long()
        self._grow(int(index.max()) + 1)
        last = torch.zeros(len(self._uses), dtype=torch.int64).scatter_reduce(
            0, index, torch.arange(len(index)), "amax"
        )
        rows = rows[last[index]]
        self._uses[index], self._shares[index] = rows[:, 1].long(), rows[:, 2:].float()

    def get_extra_state(self) -> dict[str, Any]:
        """The decisions, and about whom, for the checkpoint."""
        return {"shares": self._shares.clone(), "uses": self._uses.clone(), "names": list(self._names)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put :meth:`get_extra_state` back."""
        if state["names"] != self._names:
            raise ValueError(
                f"The checkpoint remembers decisions among the teachers {state['names']}, but the pool has "
                f"{self._names}. Use the same members in the same order, or start a new training."
            )
        self._shares, self._uses = state["shares"].cpu().clone(), state["uses"].cpu().clone()

    def _grow(self, size: int) -> None:
        if (more := size - len(self._uses)) > 0:
            self._shares = torch.cat([self._shares, torch.zeros(more, self._shares.shape[1])])
            self._uses = torch.cat([self._uses, torch.zeros(more, dtype=torch.int64)])
