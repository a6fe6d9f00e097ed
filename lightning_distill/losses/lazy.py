"""Parts whose shapes a first batch tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

Shape = tuple[int, ...]


class Lazy(nn.Module):
    """A module whose layers are made when the shapes that they work on are known.

    Subclasses define :meth:`make`. It is called once, by :meth:`build` with the shapes of a first batch, or when a
    state dict is loaded, which holds the shapes too. Until then the module has no parameters.

    Raises:
        ValueError: By :meth:`build`, if it was built for other shapes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: tuple[Shape, ...] | None = None
        # torch loads a module's own parameters before its extra state, which here tells what parameters there are.
        register: Callable[..., Any] = self.register_load_state_dict_pre_hook  # torch has no types for it
        register(_make_before_loading)

    def make(self, *shapes: Shape) -> None:
        """Create the layers for inputs of these shapes; the first number of each is the batch size, here 0."""
        raise TypeError(f"{type(self).__name__} is a `Lazy` without a `make(*shapes)`; define one.")

    def build(self, *shapes: Sequence[int]) -> None:
        """Make the layers, once; batch sizes do not matter."""
        wanted = tuple((0, *map(int, shape[1:])) for shape in shapes)
        if self.shapes is None:
            self.make(*wanted)
            self.shapes = wanted
        elif self.shapes != wanted:
            raise ValueError(
                f"{type(self).__name__} was built for features of shapes {_shown(self.shapes)}, but now they are "
                f"{_shown(wanted)}. Use one for each pair of layers."
            )

    def get_extra_state(self) -> Any:
        """The shapes, so that a checkpoint can be loaded before there was a batch."""
        return None if self.shapes is None else [list(shape) for shape in self.shapes]

    def set_extra_state(self, state: Any) -> None:
        """Make the layers that a checkpoint holds; its weights are loaded afterwards."""
        if state is not None and self.shapes is None:
            self.build(*state)


def _make_before_loading(module: Lazy, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    module.set_extra_state(state_dict.get(f"{prefix}_extra_state"))


def is_unbuilt(module: nn.Module) -> bool:
    """Whether something in ``module`` waits for a first batch."""
    return any(isinstance(part, Lazy) and part.shapes is None for part in module.modules())


def _shown(shapes: Sequence[Shape]) -> str:
    return " and ".join(str(("B", *shape[1:])).replace("'", "") for shape in shapes)
