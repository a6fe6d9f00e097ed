"""State of the random number generators, so that a resumed run draws what the uninterrupted one would have."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import distributed


def random_state() -> dict[str, Any]:
    """This process's generators: torch (CPU and the present CUDA device), Python, NumPy; in types that load safely."""
    algorithm, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  (other code may draw from it)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [algorithm, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Set this process's generators to what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    algorithm, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((algorithm, keys.numpy().astype("uint32"), position, has_gauss, gauss))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def random_states_of_all_ranks() -> list[dict[str, Any]]:
    """One state per process, in the order of their ranks; every process must call it."""
    state = random_state()
    if not (distributed.is_available() and distributed.is_initialized()):
        return [state]
    states: list[dict[str, Any] | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    return [entry for entry in states if entry is not None]
