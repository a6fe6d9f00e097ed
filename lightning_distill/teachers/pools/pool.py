"""Several teachers, of which each sample gets those that suit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_distill.outputs import Step
from lightning_distill.tasks import Task
from lightning_distill.teachers.frozen import FrozenTeacher
from lightning_distill.teachers.pools.choices import AverageChoice, Choice, Member
from lightning_distill.teachers.pools.panel import NothingToSayError, Panel, PoolOutputs, take_rows
from lightning_distill.teachers.teacher import Teacher


class PoolMember(Member):
    """One teacher of a :class:`TeacherPool`.

    Args:
        name: Unlike the others'.
        teacher: A network, which is frozen, or a :class:`Teacher` that is not trained, such as a ``CachedTeacher``.
        cost: Of one sample, not negative; any unit, the same for all (multiply-adds, milliseconds).
        accuracy: In [0, 1], for choices that read it.
        confidence: Mean largest probability, in [0, 1], for choices that read it.
        tags: What it is (``"large"``, ``"cnn"``, ``"trained on digits 0-4"``), for :meth:`TeacherPool.filter`.

    Raises:
        ValueError: If a number is outside its range, or ``name`` is empty.
        TypeError: If ``teacher`` is no module, or one that learns.
    """

    def __init__(
        self,
        name: str,
        teacher: Teacher | nn.Module,
        cost: float = 1.0,
        accuracy: float | None = None,
        confidence: float | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        super().__init__(name, cost, accuracy, confidence)
        if not isinstance(teacher, nn.Module):
            raise TypeError(f"The teacher {name!r} must be a network or a `Teacher`, got {type(teacher).__name__}.")
        self.teacher = teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher)
        if _learns(self.teacher):
            raise TypeError(
                f"The teacher {name!r} is a {type(teacher).__name__} that learns in training, but the members of "
                "a pool stay as they are. Use a frozen network, or make it the module's only teacher."
            )
        self.tags = frozenset(tags)


class TeacherPool(Teacher):
    """Several frozen teachers of the same classes, chosen and mixed per sample.

    A teacher is run on those samples only that its choice asks it about or gives it a share in. Probabilities are mixed
    at temperature 1; the loss softens the mixture. For tasks that classify samples.

    Args:
        members: The teachers.
        choice: Gives each its share. Default :class:`AverageChoice`.

    Raises:
        ValueError: If there are no members, two have one name, or the choice does not fit; at the first batch, if they
            have different classes.
        TypeError: If a member is no :class:`PoolMember`; when called, if the task does not classify samples.

    Example:
        >>> pool = TeacherPool([PoolMember("a", nn.Linear(4, 3)), PoolMember("b", nn.Linear(4, 3), cost=2.0)])
        >>> pool.names, list(pool.parameters())
        (('a', 'b'), [])
    """

    def __init__(self, members: Sequence[PoolMember], choice: Choice | None = None) -> None:
        super().__init__()
        if len(members) == 0:
            raise ValueError("`members` is empty: a pool needs at least one `PoolMember`.")
        for member in members:
            if not isinstance(member, PoolMember):
                raise TypeError(f"`members` must be `PoolMember`s, got {type(member).__name__}.")
        if twice := [name for name, count in Counter(member.name for member in members).items() if count > 1]:
            raise ValueError(f"Two members of the pool are named {twice[0]!r}; give each a name of its own.")
        self.members = tuple(members)
        self.teachers = nn.ModuleList(member.teacher for member in members)
        self.choice = choice if choice is not None else AverageChoice()
        self.choice.bind(self.members)
        # Sums since the report was last read. No buffers: DDP would overwrite them with the first process's.
        self._shares = torch.zeros(len(members), dtype=torch.float64)
        self._runs = torch.zeros(len(members), dtype=torch.float64)
        self._samples = 0
        self._unchecked = True

    @property
    def names(self) -> tuple[str, ...]:
        """Of the members."""
        return tuple(member.name for member in self.members)

    @property
    def ready(self) -> bool:
        """Whether all of them are."""
        return all(member.teacher.ready for member in self.members)

    def filter(self, tags: Collection[str], choice: Choice | None = None) -> TeacherPool:
        """A pool of the members that have all of ``tags``.

        Raises:
            ValueError: If there are none.
        """
        left = [member for member in self.members if member.tags.issuperset(tags)]
        if not left:
            known = sorted(set().union(*(member.tags for member in self.members)))
            raise ValueError(f"No member of the pool has all of the tags {sorted(tags)}; there are {known}.")
        return TeacherPool(left, choice)

    def forward(self, batch: Any, task: Task) -> PoolOutputs | None:
        """The mixture; ``None`` outside training where a teacher that is needed has nothing to say."""
        if task.token_items or not task.imitable:
            raise TypeError(
                f"A TeacherPool mixes class probabilities of samples, but {type(task).__name__} has none. Use a task "
                "that classifies samples, or a single teacher."
            )
        if self._unchecked:
            self._check_classes(batch, task)
        by_name = {member.name: member.teacher for member in self.members}
        panel = Panel(by_name, batch, task, training=self.training)
        try:
            weights: Tensor = self.choice(panel)
            mixture = panel.mixture(weights, learned=self.choice.learned)
        except NothingToSayError as error:
            if not self.training:
                return None
            raise ValueError(f"The teacher {error.args[0]!r} of the pool has nothing to say in training.") from None
        if self.training:
            self._shares = self._shares.to(weights.device) + weights.detach().sum(dim=0)
            self._runs += torch.tensor(panel.runs)
            self._samples += panel.size
        return mixture

    def trained_parameters(self) -> Iterable[nn.Parameter]:
        """Those of the choice: a router's."""
        return self.choice.parameters()

    def attach(self, student: nn.Module) -> None:
        """Tell the members whom they teach; refuse the student among them."""
        for member in self.members:
            if getattr(member.teacher, "network", None) is student:
                raise ValueError(f"The teacher {member.name!r} of the pool is the student itself; pass a copy.")
            member.teacher.attach(student)

    def place(self, device: torch.device, mesh: DeviceMesh | None) -> None:
        """Bring all members where they will be used."""
        for member in self.members:
            member.teacher.place(device, mesh)

    def see(self, step: Step) -> None:
        """Refuse a router that nothing trains; let the choice tell other processes what it decided."""
        if isinstance(step.teacher, PoolOutputs) and step.teacher.awaits_loss:
            raise ValueError(
                "The router of the pool is trained by no loss term, so it would stay as it is. Add one: "
                "`terms={'router': RouterLoss()}` from `lightning_distill.teachers`."
            )
        self.share()

    def share(self) -> None:
        """Let the choice, and those of pools among the members, tell the other processes what they have decided."""
        self.choice.share()
        for member in self.members:
            if isinstance(member.teacher, TeacherPool):
                member.teacher.share()

    def usage(self) -> tuple[Tensor, Tensor, int]:
        """Sums of shares and of runs of each teacher, and the number of training samples, since this was last called.

        Of this process. :class:`~lightning_distill.callbacks.PoolLog` logs their ratios over all processes.
        """
        sums = self._shares, self._runs.to(self._shares.device), self._samples
        self._shares, self._runs = torch.zeros_like(self._shares), torch.zeros_like(self._runs)
        self._samples = 0
        return sums

    def _check_classes(self, batch: Any, task: Task) -> None:
        """Let each say something about one sample: some may be chosen much later."""
        size = task.batch_size(batch)
        if size == 0:
            return
        one = take_rows(batch, torch.zeros(1, dtype=torch.int64), size)
        said = {member.name: member.teacher(one, task) for member in self.members}
        classes = {name: outputs.logits.shape[-1] for name, outputs in said.items() if outputs is not None}
        if len(set(classes.values())) > 1:
            raise ValueError(
                f"The teachers of the pool have different numbers of classes: {classes}. Give each an output for every "
                "class of the student, also for those that it does not know."
            )
        self._unchecked = len(classes) < len(said)


def _learns(teacher: Teacher) -> bool:
    """Whether a teacher is trained, made of the student, or looks at what the student says."""
    if isinstance(teacher, TeacherPool):
        return teacher.choice.learned
    return any(
        getattr(type(teacher), name) is not getattr(Teacher, name) for name in ("see", "copies", "trained_parameters")
    )
