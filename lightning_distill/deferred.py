"""Networks that get their weights where they will be trained, each process its share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lightning_distill.sharding import assign

SOURCE = "weights_are_in"


def on_meta(build: Callable[[], nn.Module], weights: str | Path) -> nn.Module:
    """The network that ``build`` makes, without its weights: these are read when the Trainer knows where to put them.

    For networks that one process cannot, or need not, hold whole. The module's ``configure_model`` reads one tensor
    after the other, straight to the device, and under a strategy that spreads weights each process keeps its share.
    Buffers (position tables and the like) are made as usual.

    Args:
        build: Makes the network, as ``partial(from_config, "gpt2", "causal-lm")``; called once, here.
        weights: A ``.safetensors`` file (what ``module.export`` writes), or a folder with such files, as
            ``save_pretrained`` writes it.

    Returns:
        The network; ``student``, or the network of a :class:`~lightning_distill.teachers.FrozenTeacher`.

    Raises:
        FileNotFoundError: If there are no weights.

    Example:
        >>> student = on_meta(lambda: nn.Linear(2, 2), "runs/student.safetensors")  # doctest: +SKIP
        >>> student.weight.device  # doctest: +SKIP
        device(type='meta')
    """
    _files(Path(weights))
    with _parameters_on_meta():
        network = build()
    setattr(network, SOURCE, str(weights))
    return network


@torch.no_grad()
def give_weights(network: nn.Module, device: torch.device) -> None:
    """Read the weights of a network from :func:`on_meta` onto ``device``; nothing happens to other networks.

    Args:
        network: Changed in place; its parameters may be spread over processes already.
        device: Of this process.

    Raises:
        ValueError: If there is a parameter without data, and no file, or another one, to read it from.
    """
    missing = {name: parameter for name, parameter in _all_parameters(network) if parameter.is_meta}
    if not missing:
        return
    source = getattr(network, SOURCE, None)
    if source is None:
        raise ValueError(
            f"The network's parameter {next(iter(missing))} is on the meta device, without data. Build it with "
            "`lightning_distill.deferred.on_meta(build, weights)`, which says where its weights are."
        )
    with _open(Path(source)) as files:
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (a file is no mapping)
        found: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in missing.items():
            if id(parameter) not in found and name in where:
                shape = tuple(where[name].get_slice(name).get_shape())
                if shape != tuple(parameter.shape):
                    raise ValueError(
                        f"{name} has shape {shape} in {source!r}, but {tuple(parameter.shape)} in this "
                        f"{type(network).__name__}. Build the network as when the weights were saved."
                    )
                found[id(parameter)] = name, _share(where[name].get_tensor(name), parameter, device)
    if unknown := [name for name, parameter in missing.items() if id(parameter) not in found]:
        raise ValueError(
            f"{source!r} has no weights for {unknown[0]} ({len(unknown)} in all) of this {type(network).__name__}. "
            "Build the network as when the weights were saved."
        )
    assign(network, dict(found.values()))


def _share(whole: Tensor, parameter: Tensor, device: torch.device) -> Tensor:
    """What this process keeps of a tensor."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    whole = whole.to(device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _all_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return network.named_parameters(remove_duplicate=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within this context new parameters lose their data at once; buffers, of which no file has all, keep theirs."""

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() and file.suffix == ".safetensors" for file in files):
        raise FileNotFoundError(
            f"There are no weights at {str(path)!r}; expected a `.safetensors` file, or a folder with some."
        )
    return files


@contextmanager
def _open(path: Path) -> Iterator[list[Any]]:
    from safetensors import safe_open

    with ExitStack() as stack:
        yield [stack.enter_context(safe_open(file, framework="pt")) for file in _files(path)]
