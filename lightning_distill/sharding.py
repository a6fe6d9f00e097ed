"""Networks whose weights are spread over processes (FSDP2), and the way back to a plain one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")
ENTRANCE = "_run_inside"


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The blocks that a network repeats: entries of its outermost lists and sequences of at least two.

    Each is gathered, used and given back on its own, so that one block at a time is whole.

    Example:
        >>> network = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ReLU())
        >>> repeated_blocks(network)
        [Linear(in_features=2, out_features=2, bias=True), Linear(in_features=2, out_features=2, bias=True)]
    """
    return list(_outermost(network))


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        blocks = [block for block in child.children() if next(block.parameters(), None) is not None]
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(blocks) >= 2:
            yield from blocks
        else:
            yield from _outermost(child)


def data_parallel_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The part of a ``ModelParallelStrategy``'s mesh over which weights are spread.

    Raises:
        ValueError: If the mesh has a dimension for tensor parallelism, whose plan only the network's author knows.
    """
    size = mesh["tensor_parallel"].size()
    if size > 1:
        raise ValueError(
            f"The device mesh has tensor_parallel_size={size}, but only data parallelism is planned for any network. "
            f"Use `ModelParallelStrategy(data_parallel_size={mesh.size()}, tensor_parallel_size=1)` (without arguments "
            "it is the other way round), or override `configure_model` with a plan for your network."
        )
    return mesh["data_parallel"]


def shard(network: nn.Module, mesh: DeviceMesh) -> Callable[[], nn.Module]:
    """Spread the weights of ``network`` over the processes of ``mesh``, in place, block by block.

    Its parameters become ``DTensor``s, a share on each process; forward passes gather what they need. Embeddings and
    the output layer stay whole from the forward to the end of the backward, because losses read the output layer.

    Args:
        network: Without forward hooks of its own that must not be copied.
        mesh: One dimension.

    Returns:
        Puts the network together again: a copy on the CPU, of its own class. All processes must call it; the first
        gets the weights, the others the network without any (on the meta device).
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    plain = _without_weights(network)
    for block in repeated_blocks(network):
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    setattr(network, ENTRANCE, MethodType(_call, network))
    register_fsdp_forward_method(network, ENTRANCE)
    return lambda: _put_together(network, copy.deepcopy(plain))


def spread_parameters(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters of ``module``, whose forward alone uses them, over the processes of ``mesh``; if it can.

    Numbers (parameters without dimensions) cannot be spread: see :func:`average_plain_gradients`.
    """
    from torch.distributed.fsdp import fully_shard

    if any(parameter.ndim > 0 for parameter in module.parameters()):
        numbers = {parameter for parameter in module.parameters() if parameter.ndim == 0}
        fully_shard(module, mesh=mesh, ignored_params=numbers)


def average_plain_gradients(parameters: Iterable[nn.Parameter], over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Make the gradients of parameters that are not spread their mean over the processes."""
    from torch.distributed.tensor import DTensor

    for parameter in parameters:
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            parameter.grad.copy_(over_ranks(parameter.grad))


def is_sharded(network: nn.Module) -> bool:
    """Whether the weights of ``network`` are spread over processes by :func:`shard`."""
    return hasattr(network, ENTRANCE)


def inside(network: nn.Module, function: Callable[[], T]) -> T:
    """``function()``, which may call parts of ``network`` as if it ran in the network's own forward.

    A spread network gathers its weights when it is entered, and only then; elsewhere this is a plain call.
    """
    if not is_sharded(network):
        return function()
    result: T = getattr(network, ENTRANCE)(function)
    return result


def _call(network: nn.Module, function: Callable[[], T]) -> T:
    return function()


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy with parameters on the meta device and real buffers, of which some stand in no state dict."""
    copies: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in network.parameters()
    }
    return copy.deepcopy(network, copies).eval()


@torch.no_grad()
def _put_together(network: nn.Module, plain: nn.Module) -> nn.Module:
    from torch.distributed.tensor import DTensor

    first = torch.distributed.get_rank() == 0
    state: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value  # every process takes part
        if first:
            state[name] = whole.to("cpu", copy=True)
    if first:
        assign(plain, state)
    return plain


def assign(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the tensors of ``state`` the parameters and buffers of ``network``; tied parameters stay one.

    Args:
        network: Changed in place.
        state: By name; of tied parameters one name is enough. Names that are missing stay what they are.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    complete = dict(state)
    for of_one in names.values():
        if (known := next((name for name in of_one if name in state), None)) is not None:
            complete |= dict.fromkeys(of_one, nn.Parameter(state[known], requires_grad=False))
    network.load_state_dict(complete, assign=True, strict=False)  # which keeps `requires_grad` as it was
