"""What is computed from batches every few steps and kept between."""

from __future__ import annotations

from typing import Any

from lightning_distill.losses.lazy import Lazy


class Refreshed(Lazy):
    """A :class:`Lazy` whose buffers are found anew in every ``every``-th forward pass, beginning with the first.

    The passes are counted on the host, so that no pass waits for the device, and the count is in the checkpoint.

    Args:
        every: Positive.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        if not every >= 1:
            raise ValueError(f"`every` must be positive, got {every}.")
        self.every = every
        self.passes = 0

    def is_due(self) -> bool:
        """Count a pass and tell whether it is one of those that refresh."""
        self.passes += 1
        return (self.passes - 1) % self.every == 0

    def get_extra_state(self) -> Any:
        """The shapes and the count."""
        return {"shapes": super().get_extra_state(), "passes": self.passes}

    def set_extra_state(self, state: Any) -> None:
        """Make the buffers that a checkpoint holds, and go on counting."""
        if state is not None:
            super().set_extra_state(state["shapes"])
            self.passes = state["passes"]
