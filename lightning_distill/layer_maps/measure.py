"""What a student's and a teacher's layers say about some batches: all that maps are chosen by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_distill.layer_maps.choices import cka_map, importance_map, monotone_map, uniform_map
from lightning_distill.layer_maps.layer_map import LayerMap
from lightning_distill.layer_maps.scores import cka_similarity, fitted_cost, knowledge_density, taylor_importance
from lightning_distill.layer_maps.shorten import find_stack
from lightning_distill.modes import inference
from lightning_distill.outputs import Outputs, Step

BatchLoss = Callable[[Outputs, Any], Tensor]
KeepBy = Literal["uniform", "importance", "density"]


@dataclass(frozen=True)
class LayerMeasurements:
    """What the layers of two networks say, and the maps that follow from it.

    Attributes:
        student: Features of each of the student's layers, shape ``(n, d_S)``; a row is a position of a sequence, or
            a sample.
        teacher: The same rows of each of the teacher's layers, ``(n, d_T)``.
        density: :func:`knowledge_density` of each teacher layer, relative to its input, shape ``(L_T,)``; ``None``
            where layers change the shape.
        importance: :func:`taylor_importance` of each teacher layer for its own loss, shape ``(L_T,)``; ``None``
            without a loss.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    density: Tensor | None = None
    importance: Tensor | None = None

    def taylor(self) -> LayerMap:
        """The teacher layers on which its own loss depends most.

        Raises:
            ValueError: If there was no loss.
        """
        if self.importance is None:
            raise ValueError(
                "There is no importance: the batches have no labels. Pass `loss=`, a function of the teacher's outputs "
                "and the batch, to `measure_layers`."
            )
        return importance_map(self.importance, len(self.student), name="Taylor importance")

    def densest(self) -> LayerMap:
        """The teacher layers that change their input most.

        Raises:
            ValueError: If the layers change the shape.
        """
        if self.density is None:
            raise ValueError("The teacher's layers change the shape of their input, so none has a density.")
        return importance_map(self.density, len(self.student), name="relative density")

    def fitted(self, *, ridge: float = 1e-3) -> LayerMap:
        """The monotone map whose teacher layers are best predicted linearly from the student's.

        Args:
            ridge: See :func:`fitted_cost`.
        """
        return monotone_map(fitted_cost(self.student, self.teacher, ridge=ridge), name="unexplained variance")

    def similar(self, *, monotone: bool = True) -> LayerMap:
        """The map of the largest total CKA.

        Args:
            monotone: Whether higher layers must learn from higher layers.
        """
        return cka_map(cka_similarity(self.student, self.teacher), monotone=monotone)


def measure_layers(
    module: Any,
    loader: Iterable[Any],
    *,
    batches: int = 8,
    rows: int = 1024,
    student_layers: Sequence[str] | None = None,
    teacher_layers: Sequence[str] | None = None,
    channel_dim: int | None = None,
    loss: BatchLoss | None = None,
    seed: int = 0,
) -> LayerMeasurements:
    """Run both networks of ``module`` over some batches and keep what layer maps are chosen by.

    Both run in eval mode; weights, modes and the random state stay as they are. The teacher's importance costs one
    backward pass per batch, through its layers and not into its weights.

    Args:
        module: A ``DistillationModule`` with a frozen network as teacher.
        loader: Batches as the module trains on.
        batches: How many of them.
        rows: How many rows of features are kept in all, chosen at random. CKA needs memory in its square.
        student_layers: Paths of the student's layers from below. Default: the list that :func:`find_stack` finds.
        teacher_layers: The same for the teacher.
        channel_dim: Axis of the channels: by default 1 for images and the last for everything else; 1 for signals
            under 1-d convolutions.
        loss: Of the teacher: a function of its outputs and the batch that gives a scalar, a sum over samples. Default:
            the task's loss on the labels, where there are labels.
        seed: Of the choice of rows.

    Returns:
        Features of both networks on the CPU, and the importance of the teacher's layers.

    Raises:
        ValueError: If the teacher has no network, the loader no batch, the networks no layers that can be found, or
            the sequences differ in length.
    """
    teacher = getattr(getattr(module, "teacher", None), "network", None)
    if not isinstance(teacher, nn.Module):
        raise ValueError(
            f"`module` needs a frozen network as teacher, whose layers can be seen, got {type(module).__name__} with "
            f"the teacher {type(getattr(module, 'teacher', None)).__name__}."
        )
    student: nn.Module = module.student
    ours, theirs = _modules(student, student_layers), _modules(teacher, teacher_layers)
    generator = torch.Generator().manual_seed(seed)
    kept: tuple[list[list[Tensor]], list[list[Tensor]]] = ([], [])
    densities, importances = [], []
    device = next((p.device for p in student.parameters()), torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        for batch in itertools.islice(loader, batches):
            batch = _to(batch, device)
            with inference(student), _listening(ours, leaf=False) as student_hidden:
                module.task.run(student, batch)
            with inference(teacher), _listening(theirs, leaf=True) as teacher_hidden, torch.enable_grad():
                outputs = module.task.run(teacher, batch)
                total = _total_loss(module.task, outputs, batch, loss)
                if total is not None:
                    gradients = torch.autograd.grad(total, teacher_hidden[1:])
                    pairs = zip(gradients, teacher_hidden[1:], strict=True)
                    importances.append(torch.stack([taylor_importance(g, h.detach()) for g, h in pairs]).cpu())
            mask = module.task.positions(batch)
            if mask is not None and mask.shape != teacher_hidden[0].shape[:2]:
                mask = None
            if len({state.shape for state in teacher_hidden}) == 1 and channel_dim in (None, -1):
                densities.append(_density(teacher_hidden, mask, channel_dim))
            _keep(kept, student_hidden[1:], teacher_hidden[1:], mask, channel_dim, -(-rows // batches), generator)
    if not kept[0]:
        raise ValueError("`loader` gave no batch to measure the layers on.")
    return LayerMeasurements(
        student=[torch.cat(parts) for parts in zip(*kept[0], strict=True)],
        teacher=[torch.cat(parts) for parts in zip(*kept[1], strict=True)],
        density=torch.stack(densities).mean(dim=0) if densities else None,
        importance=torch.stack(importances).mean(dim=0) if importances else None,
    )


def choose_layers(
    network: nn.Module,
    count: int,
    by: KeepBy = "uniform",
    *,
    loader: Iterable[Any] | None = None,
    task: Any = None,
    stack: str | None = None,
    batches: int = 8,
    channel_dim: int | None = None,
    loss: BatchLoss | None = None,
) -> tuple[int, ...]:
    """Which layers of ``network`` a shorter copy of it keeps; :func:`build_student` makes the copy.

    * ``"uniform"``: evenly spaced ones, the last among them; needs no data;
    * ``"importance"``: those on which the network's own loss depends most (:func:`taylor_importance`);
    * ``"density"``: those that change their input most (:func:`knowledge_density`, relative to the input).

    Args:
        network: Its weights, mode and the random state stay as they are.
        count: How many, from 1 to all of them.
        by: See above.
        loader: Batches to measure on; for ``"uniform"`` not read.
        task: How a batch is read, a :class:`~lightning_distill.tasks.Task`; for ``"uniform"`` not used.
        stack: Path of the list of layers; by default :func:`find_stack` looks for it.
        batches: How many batches are measured.
        channel_dim: See :func:`measure_layers`.
        loss: See :func:`measure_layers`.

    Returns:
        Ascending numbers of layers, counted from 1.

    Raises:
        ValueError: If ``count`` or ``by`` is outside its range, there is nothing to measure on, or the layers cannot be
            scored so.

    Example:
        >>> blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        >>> choose_layers(nn.ModuleDict({"blocks": blocks}), 3)
        (2, 4, 6)
    """
    if by not in ("uniform", "importance", "density"):
        raise ValueError(f"`by` must be 'uniform', 'importance' or 'density', got {by!r}.")
    path = find_stack(network) if stack is None else stack
    depth = len(list(network.get_submodule(path).children()))
    if not 1 <= count <= depth:
        raise ValueError(f"The network has {depth} layers in {path!r}, so from 1 to {depth} can be kept, got {count}.")
    if by == "uniform":
        return uniform_map(count, depth).teacher
    if loader is None or task is None:
        raise ValueError(f"`by={by!r}` measures the layers on data: pass `loader` and `task`, or use 'uniform'.")
    layers = [f"{path}.{name}" for name, _ in network.get_submodule(path).named_children()]
    both = SimpleNamespace(student=network, teacher=SimpleNamespace(network=network), task=task)
    options: Any = {"batches": batches, "channel_dim": channel_dim, "loss": loss}
    measured = measure_layers(both, loader, rows=1, student_layers=layers, teacher_layers=layers, **options)
    scores, missing = {
        "importance": (measured.importance, "the batches have no labels"),
        "density": (measured.density, "they change the shape of their input"),
    }[by]
    if scores is None:
        raise ValueError(f"The layers have no {by}: {missing}. Use another `by`.")
    return importance_map(scores, count, name=by).teacher


def _modules(network: nn.Module, names: Sequence[str] | None) -> list[nn.Module]:
    if names is None:
        return list(network.get_submodule(find_stack(network)).children())
    known = dict(network.named_modules())
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{type(network).__name__} has no submodule {unknown[0]!r}, which is named as a layer.")
    return [known[name] for name in names]


@contextmanager
def _listening(layers: Sequence[nn.Module], *, leaf: bool) -> Iterator[list[Tensor]]:
    """Within this context the list fills with the input of the first layer and the output of each.

    With ``leaf`` the input becomes a leaf that requires a gradient, so that there is a graph above frozen weights.
    """
    seen: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = not (args and isinstance(args[0], Tensor))
        state: Tensor = kwargs["hidden_states"] if named else args[0]
        if leaf:
            state = state.detach().requires_grad_()
        seen[:] = [state]  # a task may try a network out before it runs it: what counts is the last pass
        return (args, kwargs | {"hidden_states": state}) if named else ((state, *args[1:]), kwargs)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _total_loss(task: Any, outputs: Outputs, batch: Any, loss: BatchLoss | None) -> Tensor | None:
    if loss is not None:
        return loss(outputs, batch)
    labels = task.labels(batch)
    if labels is None:
        return None
    values: Tensor = task.hard_term()(Step(batch=batch, student=outputs, labels=labels))
    mask = task.mask(batch, outputs)
    return values.sum() if mask is None else values[mask].sum()


def _density(hidden: Sequence[Tensor], mask: Tensor | None, channel_dim: int | None) -> Tensor:
    states = [_channels_last(state.detach(), channel_dim) for state in hidden]
    return knowledge_density(states, mask=mask, relative=True).cpu()


def _keep(
    kept: tuple[list[list[Tensor]], list[list[Tensor]]],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    channel_dim: int | None,
    count: int,
    generator: torch.Generator,
) -> None:
    rows = [[_rows(state.detach(), mask, channel_dim) for state in states] for states in (student, teacher)]
    sizes = {len(layer) for layers in rows for layer in layers}
    if len(sizes) > 1:
        raise ValueError(
            f"The layers of student and teacher speak about different numbers of positions: {sorted(sizes)}. Both must "
            "read the same tokens."
        )
    chosen = torch.randperm(sizes.pop(), generator=generator)[:count]
    for parts, layers in zip(kept, rows, strict=True):
        parts.append([layer[chosen.to(layer.device)].float().cpu() for layer in layers])


def _rows(state: Tensor, mask: Tensor | None, channel_dim: int | None) -> Tensor:
    """Features ``(n, d)``: one row per position of a sequence, else the mean over space of each sample."""
    state = _channels_last(state, channel_dim)
    if mask is not None:
        return state[mask]
    return state.flatten(1, -2).mean(dim=1) if state.ndim > 2 else state


def _channels_last(state: Tensor, channel_dim: int | None) -> Tensor:
    if channel_dim is None:
        channel_dim = 1 if state.ndim in (4, 5) else -1
    return state.movedim(channel_dim, -1)


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    return [_to(value, device) for value in batch] if isinstance(batch, (list, tuple)) else batch
