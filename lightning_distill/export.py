"""A trained network on disk."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_distill.adapters import has_adapter, merge_adapter
from lightning_distill.files import draft_of


def standalone(network: nn.Module) -> nn.Module:
    """A copy of ``network`` on the CPU, in eval mode, a PEFT adapter merged into its weights.

    Weights are copied straight to the CPU: the device that trains never holds them twice.

    Raises:
        ValueError: If there is an adapter that cannot be merged.
    """
    copies: dict[int, Any] = {}
    for tensor in (*network.parameters(), *network.buffers()):
        if type(tensor) is nn.Parameter:
            copies[id(tensor)] = nn.Parameter(_on_cpu(tensor), requires_grad=tensor.requires_grad)
        elif type(tensor) is Tensor:
            copies[id(tensor)] = _on_cpu(tensor)
    return merged(copy.deepcopy(network, copies).cpu())


def merged(network: nn.Module) -> nn.Module:
    """``network`` in eval mode, a PEFT adapter merged into its weights; it is used up.

    Raises:
        ValueError: If there is an adapter that cannot be merged.
    """
    return (merge_adapter(network) if has_adapter(network) else network).eval()


def write_network(network: nn.Module, path: Path, *, overwrite: bool = False) -> None:
    """Write the weights of ``network`` to ``path``, whole or not at all.

    Args:
        network: Any module; a transformers model is written with its configuration.
        path: A ``.safetensors`` file; for a transformers model also a folder, as ``from_pretrained`` reads it.
        overwrite: Whether something at ``path`` may be replaced.

    Raises:
        FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
        ValueError: If ``path`` is no such file, and the network cannot be written to a folder.
    """
    save_pretrained = getattr(network, "save_pretrained", None)
    if path.suffix != ".safetensors" and save_pretrained is None:
        raise ValueError(f"`path` must end in '.safetensors', got {str(path)!r}.")
    with draft_of(path, overwrite=overwrite) as draft:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_model

            save_model(network, str(draft))
        else:
            assert save_pretrained is not None
            save_pretrained(draft)
        if path.is_dir():
            shutil.rmtree(path)


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
