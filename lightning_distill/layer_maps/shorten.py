"""Students that are made of some of the teacher's own layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_distill.layer_maps.choices import uniform_map


class Shortening(NamedTuple):
    """One stage of a plan: a teacher, a shallower student, and the teacher's layers that the student starts from."""

    teacher_depth: int
    student_depth: int
    kept: tuple[int, ...]


def architecture_plan(depths: Sequence[int]) -> list[Shortening]:
    """Stages of a chain of ever shallower students, each made of evenly spaced layers of the one before.

    Args:
        depths: Number of layers of the first teacher and of each student, strictly decreasing.

    Returns:
        One stage per student; kept layers count from 1 and include the last. :func:`build_student` makes the student.

    Raises:
        ValueError: If there are fewer than two depths, or they do not decrease.

    Example:
        >>> architecture_plan([12, 6, 3])[1]
        Shortening(teacher_depth=6, student_depth=3, kept=(2, 4, 6))
    """
    if len(depths) < 2 or any(below >= above for above, below in itertools.pairwise(depths)):
        raise ValueError(f"`depths` must be at least two strictly decreasing numbers of layers, got {list(depths)}.")
    return [Shortening(above, below, uniform_map(below, above).teacher) for above, below in itertools.pairwise(depths)]


def build_student(teacher: nn.Module, kept: Sequence[int], *, stack: str | None = None) -> nn.Module:
    """A copy of ``teacher`` with some of its layers only: same class, same weights, fewer layers.

    For transformers models (BERT-, GPT-2-, Llama-like) the configuration is updated as well, so that the student can
    be saved, loaded and used for generation. All parameters of the student require gradients, and it is in training
    mode; the teacher is left as it is.

    Args:
        teacher: Transformers model, or any network whose layers stand in a ``ModuleList`` or ``Sequential``.
        kept: The layers that stay, ascending, counted from 1, as ``LayerMap.teacher`` counts.
        stack: Path of the list of layers, as ``"encoder.layer"``. Default: found by
            :func:`find_stack`.

    Raises:
        ValueError: If the list of layers is not found, or ``kept`` is empty, not ascending or outside of it.

    Example:
        >>> blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
        >>> len(build_student(nn.ModuleDict({"blocks": blocks}), [2, 4, 6])["blocks"])
        3
    """
    stack = find_stack(teacher) if stack is None else _checked_stack(teacher, stack)
    layers: Any = teacher.get_submodule(stack)
    depth = len(layers)
    if not kept or list(kept) != sorted(set(kept)) or not 1 <= kept[0] <= kept[-1] <= depth:
        raise ValueError(
            f"`kept` must be ascending layer numbers from 1 to {depth}, the length of {stack!r}, got {list(kept)}."
        )
    dropped = [layer for i, layer in enumerate(layers, start=1) if i not in set(kept)]
    student = copy.deepcopy(teacher, {id(layer): None for layer in dropped})  # dropped layers are not copied
    left = type(layers)(*_as_arguments(layers, student.get_submodule(stack), kept))
    parent, _, name = stack.rpartition(".")
    setattr(student.get_submodule(parent), name, left)
    if hasattr(teacher, "config"):
        _shorten_config(student, depth, [layer - 1 for layer in kept])
        _renumber(left)
    return student.requires_grad_(True).train()


def find_stack(network: nn.Module) -> str:
    """Path of the list of layers of ``network``.

    For a transformers model the one ``ModuleList`` with as many entries as its configuration has layers; for others the
    one ``ModuleList`` or ``Sequential`` at the top whose entries are of one class.

    Raises:
        ValueError: If there is none, or more than one.

    Example:
        >>> find_stack(nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.ReLU()}))
        'blocks'
    """
    config: Any = getattr(network, "config", None)
    depth = getattr(config, "num_hidden_layers", None)
    found = [
        name
        for name, module in network.named_modules()
        if name
        and isinstance(module, (nn.ModuleList, nn.Sequential))
        and len({type(layer) for layer in module}) == 1
        and (len(module) == depth if depth is not None else len(module) > 1)
    ]
    outer: list[str] = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outer) == 1:
        return outer[0]
    length = "" if depth is None else f" of {depth} layers, as its configuration says"
    what = f"{len(outer)} lists ({', '.join(map(repr, outer))})" if outer else "no list"
    raise ValueError(
        f"{type(network).__name__} has {what}{length}, where one was looked for. Name the path of the `ModuleList` of "
        "its layers: `stack='encoder.layer'`."
    )


def _checked_stack(network: nn.Module, stack: str) -> str:
    modules = dict(network.named_modules())
    if not isinstance(modules.get(stack), (nn.ModuleList, nn.Sequential)):
        lists = [name for name, module in modules.items() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        raise ValueError(
            f"`stack` must be the path of a ModuleList or Sequential of {type(network).__name__}, got {stack!r}; it "
            f"has {', '.join(map(repr, lists)) or 'none'}."
        )
    return stack


def _as_arguments(layers: Any, copied: Any, kept: Sequence[int]) -> list[Any]:
    """What the list's constructor takes: the layers one by one for a Sequential, as one list for a ModuleList."""
    left = [copied[layer - 1] for layer in kept]
    return left if isinstance(layers, nn.Sequential) else [left]


def _shorten_config(student: Any, depth: int, positions: Sequence[int]) -> None:
    config = student.config
    config.num_hidden_layers = len(positions)
    for name, value in vars(config).items():  # what is told layer by layer, such as `layer_types`
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(config, name, [value[i] for i in positions])


def _renumber(layers: nn.Module) -> None:
    """Let layers that know their number, which is their place in the cache of keys and values, know the new one."""
    for number, layer in enumerate(layers.children()):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # type: ignore[assignment]
