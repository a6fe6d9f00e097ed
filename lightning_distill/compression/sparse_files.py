"""Networks with blocks of zeros on disk, without the zeros."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_distill.compression.block_sparsity import Block, as_block, block_grid, element_mask
from lightning_distill.quantization.network import quantized_layers
from lightning_distill.quantization.packed import pack_bits, unpack_bits

VERSION = "1"
_PLAN = "lightning_distill_block_sparsity"
_VALUES, _BLOCKS = "values", "blocks"


@dataclass(frozen=True)
class SparseFile:
    """What :func:`write_block_sparse` wrote.

    Attributes:
        path: Where.
        bytes: Size of the file.
        dense_bytes: Of the same tensors with their zeros.
        sparse: Tensors written without blocks of zeros, by name: blocks kept, and blocks in all.
    """

    path: Path
    bytes: int
    dense_bytes: int
    sparse: dict[str, tuple[int, int]]

    @property
    def ratio(self) -> float:
        """Size of the file over that of the dense tensors."""
        return self.bytes / self.dense_bytes

    def __str__(self) -> str:
        width = max((len(name) for name in self.sparse), default=0)
        rows = [f"{name:{width}}  {kept:>6} of {blocks:>6} blocks" for name, (kept, blocks) in self.sparse.items()]
        return "\n".join([*rows, f"{self.bytes:,} bytes, {self.ratio:.3f} of dense ({self.dense_bytes:,})"])


def write_block_sparse(
    network: nn.Module, path: str | Path, block: str | Block = "avx512", *, overwrite: bool = False
) -> SparseFile:
    """Write the weights of ``network`` without their blocks of zeros; whole or not at all.

    Each tensor with two or more dimensions is read as a matrix of its first and all other dimensions. Of those that get
    smaller the file holds the weights of the kept blocks and one bit per block; all others as they are. Values come
    back exactly.

    Args:
        network: Any network in floating point, such as an exported student.
        path: A ``.safetensors`` file.
        block: An instruction set or rows and columns, as the student was trained with.
        overwrite: Whether a file at ``path`` may be replaced.

    Raises:
        FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
        ValueError: If ``path`` does not end in ``.safetensors``, ``block`` is none, or ``network`` is quantized or
            has a state that is no tensor.
    """
    from safetensors.torch import save_file

    path, size = Path(path), as_block(block)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in '.safetensors', got {str(path)!r}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{str(path)!r} exists. Choose another path, or pass `overwrite=True`.")
    if quantized_layers(network):
        raise ValueError(
            "`network` is quantized, and this file would hold its weights in floating point. Use `write_packed` for "
            "its bits, or `unprepare(network)` first."
        )
    dense_bytes, sparse, tensors, plan = 0, {}, {}, {}
    for name, tensor in _distinct(network):
        dense_bytes += tensor.numel() * tensor.element_size()
        mask = _kept_blocks(tensor, size)
        if mask is None:
            tensors[name] = tensor
            continue
        kept = element_mask(mask, tuple(tensor.shape), size)
        tensors[f"{name}.{_VALUES}"], tensors[f"{name}.{_BLOCKS}"] = tensor[kept], pack_bits(mask.int(), 1)
        plan[name] = list(tensor.shape)
        sparse[name] = int(mask.sum()), mask.numel()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {_PLAN: json.dumps({"version": VERSION, "block": list(size), "shapes": plan})}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        draft = Path(folder) / path.name
        save_file(tensors, str(draft), metadata=metadata)
        os.replace(draft, path)
    return SparseFile(path, path.stat().st_size, dense_bytes, sparse)


def read_block_sparse(network: nn.Module, path: str | Path) -> nn.Module:
    """A network from a file of :func:`write_block_sparse`.

    Args:
        network: Built as the one that was written; filled in place.
        path: The file.

    Returns:
        ``network`` in eval mode, with the zeros again.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is none of ours or of another version, or the network is another one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no network at {str(path)!r}.")
    state = _read(path)
    own = network.state_dict(keep_vars=True)
    given = {_identity(own[name]) for name in state if name in own}
    missing = [f"missing {name}" for name in own if name not in state and _identity(own[name]) not in given]
    wrong = [*missing, *(f"unknown {name}" for name in state if name not in own)]
    wrong += [
        f"{name} of shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and isinstance(own[name], Tensor) and own[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"The network in {str(path)!r} is not this {type(network).__name__}: {'; '.join(wrong[:3])}.")
    network.load_state_dict(state, strict=False)
    return network.eval()


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        plan = json.loads((file.metadata() or {}).get(_PLAN, "{}"))
        if plan.get("version") != VERSION:
            raise ValueError(
                f"{str(path)!r} holds no blocks of version {VERSION}; `write_block_sparse` writes them. Dense weights "
                "are read by `load_network`."
            )
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    block = as_block(plan["block"])
    for name, shape in plan["shapes"].items():
        values, bits = stored.pop(f"{name}.{_VALUES}"), stored.pop(f"{name}.{_BLOCKS}")
        grid = block_grid(tuple(shape), block)
        mask = unpack_bits(bits, 1, math.prod(grid)).bool().view(grid)
        stored[name] = values.new_zeros(shape).masked_scatter_(element_mask(mask, tuple(shape), block), values)
    return stored


def _distinct(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and a copy on the CPU of each tensor of the network's state; shared ones once."""
    seen: set[Any] = set()
    for name, value in network.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name!r} of `network` is a {type(value).__name__}; files hold tensors alone.")
        if (identity := _identity(value)) in seen:
            continue
        seen.add(identity)
        yield name, value.detach().to("cpu", copy=True).contiguous()


def _identity(value: Any) -> Any:
    """What is the same for two names of one tensor."""
    if not isinstance(value, Tensor) or value.numel() == 0:
        return id(value)
    return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype


def _kept_blocks(tensor: Tensor, block: Block) -> Tensor | None:
    """Which blocks have a weight that is not 0; ``None`` where leaving the others out would save nothing."""
    if tensor.ndim < 2 or tensor.numel() == 0:
        return None
    shape = tuple(tensor.shape)
    rows, columns = block_grid(shape, block)
    nonzero = tensor.flatten(1) != 0
    filled = nonzero.new_zeros(rows * block[0], columns * block[1])
    filled[: nonzero.shape[0], : nonzero.shape[1]] = nonzero
    mask = filled.view(rows, block[0], columns, block[1]).any(dim=3).any(dim=1)
    left_out = (~element_mask(mask, shape, block)).sum() * tensor.element_size()
    return mask if left_out > -(-mask.numel() // 8) else None
