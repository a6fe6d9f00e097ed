"""Teachers from what users have: a module, a name, a checkpoint, a function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.tasks import Task
from lightning_distill.teachers.frozen import FrozenTeacher, FunctionTeacher
from lightning_distill.teachers.teacher import Teacher

TeacherLike = Teacher | nn.Module | str | Callable[[Any], Any] | None
"""What a module takes as ``teacher``."""


def build_teacher(teacher: TeacherLike, task: Task) -> Teacher | None:
    """Make a :class:`Teacher` of ``teacher``.

    Args:
        teacher: A :class:`Teacher`; a network, which is frozen; a Hugging Face name or local path, loaded as ``task``
            wants it; a function of the batch that returns logits; or ``None``.
        task: Tells how to load a network by name.

    Raises:
        TypeError: If ``teacher`` is none of these.
        ValueError: If ``task`` cannot load networks by name.
    """
    if teacher is None or isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, nn.Module):
        return FrozenTeacher(teacher)
    if isinstance(teacher, str):
        if Path(teacher).is_file():
            raise ValueError(
                f"`teacher` is the file {teacher!r}, which holds weights but no network. Pass "
                "`teacher=load_network(network, path)` from `lightning_distill.teachers`."
            )
        return FrozenTeacher(task.load(teacher))
    if callable(teacher):
        return FunctionTeacher(teacher)
    raise TypeError(
        "`teacher` must be a module, a Hugging Face name or path, a function of the batch, a `Teacher` or None, "
        f"got {type(teacher).__name__}."
    )


def load_network(network: nn.Module, path: str) -> nn.Module:
    """``network`` with the weights in ``path``.

    Args:
        network: Built as when the weights were saved.
        path: A ``.safetensors`` file (what ``module.export`` writes), a Lightning checkpoint of one of our modules (the
            student's weights are taken), or a file with a state dict.

    Returns:
        The same ``network``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the weights are those of another network.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There are no weights at {path!r}. Train the network first, or fix `path`.")
    weights = _read_weights(path)
    if wrong := _differences(network.state_dict(), weights):
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"The weights in {path!r} are not those of this {type(network).__name__}: {'; '.join(wrong[:3])}{more}. "
            "Build the network with the arguments that it was trained with."
        )
    network.load_state_dict(weights, strict=False)  # tied weights stand in a file once
    return network


def _differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Why ``found`` does not fill ``expected``; empty if it does."""
    filled = {value.data_ptr() for name, value in expected.items() if name in found and value.numel() > 0}
    wrong = []
    for name, value in expected.items():
        if name not in found:
            if value.data_ptr() not in filled:
                wrong.append(f"missing {name}")
        elif found[name].shape != value.shape:
            wrong.append(f"{name}: {tuple(found[name].shape)} in the file, {tuple(value.shape)} in the network")
    return wrong + [f"unknown {name}" for name in found if name not in expected]


def _read_weights(path: str) -> dict[str, Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = load_file(path)
        return weights
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = loaded.get("state_dict", loaded)
    student = {key.removeprefix("student."): value for key, value in state.items() if key.startswith("student.")}
    return student or state
