"""A network that teaches and never changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Self

from lightning_distill.compatibility import check_same_language
from lightning_distill.deferred import give_weights
from lightning_distill.outputs import Outputs
from lightning_distill.sharding import is_sharded, shard
from lightning_distill.taps import Taps
from lightning_distill.tasks import Task, to_outputs
from lightning_distill.teachers.teacher import Teacher


class FrozenTeacher(Teacher):
    """A network in eval mode, without gradients, that moves to the student's device but is no part of its module.

    The network is hidden from ``named_modules``, ``parameters`` and ``state_dict``: no optimizer, checkpoint, DDP
    broadcast or ``train()`` call reaches it. Under DDP every rank must therefore build the same teacher: load it from
    a file, or build it after ``seed_everything``.

    Args:
        network: Frozen in place: its parameters stop requiring gradients, and it is put in eval mode.
        dtype: Precision of its weights; by default what they are. It is independent of the Trainer's, and
            floating-point inputs are cast to it.
        sharded: Whether a strategy that spreads the student over processes (``ModelParallelStrategy``) spreads this
            network too: for a teacher that does not fit one device. Otherwise each process has a copy, which is faster.

    Raises:
        TypeError: If ``network`` is no module.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None = None, *, sharded: bool = False) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"`network` must be a `torch.nn.Module`, got {type(network).__name__}.")
        network.requires_grad_(False).eval()
        if dtype is not None:
            network.to(dtype)
        object.__setattr__(self, "_network", network)  # past nn.Module's registration
        self._remember_weight()
        self.sharded = sharded
        self._taps = Taps(network, ())

    @property
    def network(self) -> nn.Module:
        """The network itself."""
        network: nn.Module = self.__dict__["_network"]
        return network

    def forward(self, batch: Any, task: Task) -> Outputs:
        """What the network says about ``batch``, without a graph."""
        network = self.network
        if network.training:  # somebody who holds the network itself has called train()
            network.eval()
        weight = self.__dict__["_weight"]
        # not inference_mode: the student's loss may save the teacher's tensors for its backward
        with torch.no_grad(), self._taps.recording() as features:
            outputs = task.run(network, batch if weight is None else _cast(batch, weight.dtype))
        outputs.features.update(features)
        return outputs

    def attach(self, student: nn.Module) -> None:
        """Refuse a student whose saved tokenizer differs from the network's: both read the same tokens."""
        check_same_language(student, self.network)

    def tap(self, names: Iterable[str]) -> None:
        """Keep the activations of these submodules in ``Outputs.features``; replaces earlier taps."""
        self._taps.remove()
        self._taps = Taps(self.network, names)

    def place(self, device: torch.device, mesh: DeviceMesh | None) -> None:
        """Spread the network over the processes of ``mesh``, if it is ``sharded``; read weights that it lacks yet."""
        if self.sharded and mesh is not None and not is_sharded(self.network):
            names = self._taps.names
            self._taps.remove()
            shard(self.network, mesh)
            self._taps = Taps(self.network, names)
        give_weights(self.network, device)
        self._remember_weight()

    def _remember_weight(self) -> None:
        """Keep a floating-point weight, whose dtype is that of the network, past nn.Module's registration."""
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        object.__setattr__(self, "_weight", weight)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of this shell; the network stays in eval mode."""
        self.network.eval()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The parent's .to(), .cuda() … arrive here. Follow the device, keep the own dtype; a probe tells the device
        # without running `fn` on the weights (which `to_empty` would destroy).
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if recurse and (first := next(self.network.parameters(), None)) is not None:
            device = fn(torch.empty(0, device=first.device)).device
            if device.type != "meta" and device != first.device:
                self.network.to(device)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Copies of the module (weight averaging, say) share the teacher instead of doubling it.
        memo[id(self)] = self
        return self


class FunctionTeacher(Teacher):
    """A function of the batch as teacher: logits from a server, a table, an ensemble of anything.

    Args:
        function: Maps the batch to logits of the student's shape, or to :class:`Outputs`.

    Raises:
        TypeError: If ``function`` cannot be called.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        if not callable(function):
            raise TypeError(f"`function` must be callable, got {type(function).__name__}.")
        self.function = function

    @torch.no_grad()
    def forward(self, batch: Any, task: Task) -> Outputs:
        """What the function returns for ``batch``."""
        return to_outputs(self.function(batch))


def _cast(batch: Any, dtype: torch.dtype) -> Any:
    """``batch`` with its floating-point tensors in ``dtype``."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.dtype != dtype and batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: _cast(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return [_cast(value, dtype) for value in batch]
    return batch
