"""Which layer of the teacher teaches which layer of the student."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

EMBEDDINGS = 0
HIDDEN_STATES = "hidden_states."


@dataclass(frozen=True)
class LayerMap:
    """Layers of the student, and the layer of the teacher that each of them learns from.

    Layers count from 1, at the input; 0 stands for the embeddings below the first layer. ``print`` shows a table,
    :meth:`plot` draws the map over the scores that it was chosen by.

    Attributes:
        student: Layers of the student, ascending.
        teacher: The teacher's layer for each of them.
        student_depth: Number of layers of the student.
        teacher_depth: Number of layers of the teacher.
        method: How the map was chosen.
        scores: What it was chosen by: importance of each teacher layer, shape ``(L_T,)``; or a value per pair, shape
            ``(L_S, L_T)``; or nothing.
        score: What the scores are.

    Raises:
        ValueError: If the two differ in length, are empty, or a layer is outside its network.

    Example:
        >>> layers = LayerMap((1, 2), (2, 4), student_depth=2, teacher_depth=4)
        >>> layers.pairs("hidden_states.{}")
        {'hidden_states.1': 'hidden_states.2', 'hidden_states.2': 'hidden_states.4'}
        >>> layers.pairs("encoder.layer.{}")
        {'encoder.layer.0': 'encoder.layer.1', 'encoder.layer.1': 'encoder.layer.3'}
    """

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    student_depth: int
    teacher_depth: int
    method: str = "explicit"
    scores: Tensor | None = field(default=None, compare=False, repr=False)
    score: str = "score"

    def __post_init__(self) -> None:
        if len(self.student) != len(self.teacher) or not self.student:
            raise ValueError(
                f"A layer map needs one teacher layer per student layer, at least one, got {len(self.student)} of the "
                f"student and {len(self.teacher)} of the teacher."
            )
        if list(self.student) != sorted(set(self.student)):
            raise ValueError(f"The student's layers must ascend, each once, got {self.student}.")
        for who, layers, depth in (
            ("student", self.student, self.student_depth),
            ("teacher", self.teacher, self.teacher_depth),
        ):
            if wrong := [layer for layer in layers if not 0 <= layer <= depth]:
                raise ValueError(
                    f"The {who} has no layer {wrong[0]}: it has {depth} layers, numbered 1 to {depth} (0 are the "
                    "embeddings)."
                )

    def __len__(self) -> int:
        return len(self.student)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of a student layer and its teacher layer."""
        return iter(zip(self.student, self.teacher, strict=True))

    @property
    def teacher_positions(self) -> tuple[int, ...]:
        """The teacher's layers counted from 0, as in a list of modules.

        Example:
            >>> LayerMap((1, 2), (2, 4), student_depth=2, teacher_depth=4).teacher_positions
            (1, 3)
        """
        return tuple(layer - 1 for layer in self.teacher)

    def with_embeddings(self) -> LayerMap:
        """The same map with the student's embeddings learning from the teacher's; for ``hidden_states`` only."""
        if self.student[0] == EMBEDDINGS:
            return self
        return replace(self, student=(EMBEDDINGS, *self.student), teacher=(EMBEDDINGS, *self.teacher))

    def pairs(self, student: str, teacher: str | None = None) -> dict[str, str]:
        """Names of taps, the student's to the teacher's, as feature terms take them.

        Args:
            student: Name of a tap with ``{}`` where the layer's number comes. ``"hidden_states.{}"`` counts as
                transformers does, from 0 for the embeddings; everything else (paths of submodules, ``attentions``)
                counts the layers from 0.
            teacher: The same for the teacher; by default as for the student.

        Raises:
            ValueError: If a name has no ``{}``, or the map has the embeddings and the name is not of hidden states.
        """
        teacher = student if teacher is None else teacher
        return {_name(student, ours): _name(teacher, theirs) for ours, theirs in self}

    def table(self) -> Table:
        """The map as a rich table, with the score of each choice where there are scores."""
        from rich.table import Table

        table = Table(title=str(self).splitlines()[0])
        table.add_column("student layer", justify="right")
        table.add_column("teacher layer", justify="right")
        if self.scores is not None:
            table.add_column(self.score, justify="right")
        for ours, theirs in self:
            row = [_shown(ours), _shown(theirs)]
            if self.scores is not None:
                row.append("" if theirs == EMBEDDINGS else f"{self._score_of(ours, theirs):.4g}")
            table.add_row(*row)
        return table

    def plot(self, path: str | Path) -> Path:
        """Draw the map as a PNG file: cells are pairs, dark where the score is high; chosen ones are framed.

        Args:
            path: Of the file.

        Returns:
            ``path``.
        """
        from lightning_distill.layer_maps.plot import plot_map

        return plot_map(self, Path(path))

    def __str__(self) -> str:
        head = f"{self.method}: {self.student_depth} layers learn from {self.teacher_depth}"
        width = max(len(_shown(layer)) for layer in (*self.student, *self.teacher))
        lines = [f"  {_shown(ours):>{width}} <- {_shown(theirs):>{width}}{self._told(ours, theirs)}"
                 for ours, theirs in self]  # fmt: skip
        return "\n".join([head, *lines])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()

    def _told(self, ours: int, theirs: int) -> str:
        if self.scores is None or theirs == EMBEDDINGS:
            return ""
        return f"   {self.score} {self._score_of(ours, theirs):.4g}"

    def _score_of(self, ours: int, theirs: int) -> float:
        assert self.scores is not None
        row = self.scores if self.scores.ndim == 1 else self.scores[ours - 1]
        return float(row[theirs - 1])


def explicit_map(teacher_layers: Sequence[int], student_depth: int, teacher_depth: int) -> LayerMap:
    """The layers that you name: the ``i``-th for the student's layer ``i``.

    Args:
        teacher_layers: One per layer of the student, counted from 1; negative ones from the top (-1 is the last).
        student_depth: Number of layers of the student.
        teacher_depth: Number of layers of the teacher.

    Raises:
        ValueError: If their number is not ``student_depth``, or one is outside the teacher.

    Example:
        >>> explicit_map([1, 3, -1], 3, 6).teacher
        (1, 3, 6)
    """
    if len(teacher_layers) != student_depth:
        raise ValueError(
            f"`teacher_layers` must name one layer for each of the student's {student_depth}, got "
            f"{len(teacher_layers)}: {list(teacher_layers)}."
        )
    counted = tuple(layer if layer >= 0 else teacher_depth + 1 + layer for layer in teacher_layers)
    return LayerMap(tuple(range(1, student_depth + 1)), counted, student_depth, teacher_depth)


def _name(template: str, layer: int) -> str:
    if "{}" not in template:
        raise ValueError(f"The name of a tap needs {{}} where the layer's number comes, got {template!r}.")
    if template.startswith(HIDDEN_STATES):
        return template.format(layer)
    if layer == EMBEDDINGS:
        raise ValueError(
            f"The map has the embeddings (layer 0), of which {template!r} knows nothing; use 'hidden_states.{{}}', or "
            "name the pair of embeddings yourself."
        )
    return template.format(layer - 1)


def _shown(layer: int) -> str:
    return "embeddings" if layer == EMBEDDINGS else str(layer)
