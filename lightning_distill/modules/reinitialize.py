"""Fresh weights for a network that exists already."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from lightning_distill.modules.random_state import random_state, set_random_state

Reinitialize = Callable[[nn.Module], object]


def reset_parameters(network: nn.Module) -> None:
    """Call ``reset_parameters`` of every module in ``network`` that has parameters or buffers of its own.

    They draw what they draw when they are built: torch's default initialization, not what the network's own
    constructor may have put there afterwards.

    Raises:
        ValueError: If such a module has no ``reset_parameters``.
    """
    check_resettable(network)
    for module in _with_state(network).values():
        module.reset_parameters()  # type: ignore[operator]


def check_resettable(network: nn.Module) -> None:
    """Refuse a network with weights that nobody would reset.

    Raises:
        ValueError: If a module has parameters but no ``reset_parameters``; the message names it.
    """
    for name, module in _with_state(network).items():
        if not callable(getattr(module, "reset_parameters", None)):
            own = [key for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
            raise ValueError(
                f"The student's {type(module).__name__} {name or '(the student itself)'!r} has {own} but no "
                "`reset_parameters()`, so that it cannot be initialized again. Give it this method, or pass "
                "`reinitialize`, a function of the student that does it, such as "
                "`lambda student: student.load_state_dict(build_student().state_dict())`."
            )


def reinitialize(network: nn.Module, how: Reinitialize, *, seed: int) -> None:
    """Call ``how(network)`` with every random number generator seeded; afterwards they are where they were.

    Args:
        network: Changed in place.
        how: Gives it new weights.
        seed: The same weights for the same seed, on every process.
    """
    before = random_state()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (initializers may draw from it)
    try:
        with torch.no_grad():
            how(network)
    finally:
        set_random_state(before)


def _with_state(network: nn.Module) -> dict[str, nn.Module]:
    """Modules by name that have parameters or persistent buffers of their own."""
    return {
        name: module
        for name, module in network.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        or any(key not in module._non_persistent_buffers_set for key, _ in module.named_buffers(recurse=False))
    }
