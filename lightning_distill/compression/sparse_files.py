"""Networks with blocks of zeros on disk, without the zeros."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_distill.compression.blocks import Block, as_block, block_grid, element_mask
from lightning_distill.files import draft_of
from lightning_distill.quantization.fake_quantize import Grid
from lightning_distill.quantization.network import quantized_layers
from lightning_distill.quantization.packed import pack_bits, read_packed, unpack_bits, write_packed
from lightning_distill.quantization.quantized_layer import output_channels

VERSION = "1"
_PLAN = "lightning_distill_block_sparsity"
_VALUES, _BLOCKS = "values", "blocks"


@dataclass(frozen=True)
class SparseFile:
    """What :func:`write_block_sparse` wrote.

    Attributes:
        path: Where.
        bytes: Size of the file.
        dense_bytes: Of the same numbers with their zeros; of quantized layers those with few bits.
        sparse: Tensors written without blocks of zeros, by name: blocks kept, and blocks in all.
    """

    path: Path
    bytes: int
    dense_bytes: int
    sparse: dict[str, tuple[int, int]]

    @property
    def ratio(self) -> float:
        """Size of the file over that of the dense numbers."""
        return self.bytes / self.dense_bytes

    def __str__(self) -> str:
        width = max((len(name) for name in self.sparse), default=0)
        rows = [f"{name:{width}}  {kept:>6} of {blocks:>6} blocks" for name, (kept, blocks) in self.sparse.items()]
        return "\n".join([*rows, f"{self.bytes:,} bytes, {self.ratio:.3f} of dense ({self.dense_bytes:,})"])


@dataclass(frozen=True)
class _Layout:
    """How a tensor is read as a matrix: its shape, and of packed codes the bits and the code that stands for 0."""

    shape: tuple[int, ...]
    bits: int | None = None
    zero: int = 0

    def unpacked(self, tensor: Tensor) -> Tensor:
        """The numbers of ``tensor`` in their shape."""
        numbers = tensor if self.bits is None else unpack_bits(tensor, self.bits, math.prod(self.shape))
        return numbers.view(self.shape)

    def packed(self, numbers: Tensor) -> Tensor:
        """``numbers`` as a file holds them."""
        return numbers if self.bits is None else pack_bits(numbers.int(), self.bits)


def write_block_sparse(
    network: nn.Module, path: str | Path, block: str | Block = "avx512", *, overwrite: bool = False
) -> SparseFile:
    """Write ``network`` without its blocks of zeros; whole or not at all.

    Each tensor with two or more dimensions is read as a matrix of its first and all other dimensions. Of those that get
    smaller the file holds the weights of the kept blocks and one bit per block; all others as they are. Weights of
    quantized layers have as many bits as in :func:`~lightning_distill.quantization.write_packed`. Values come back
    exactly.

    Args:
        network: Any network, such as an exported student.
        path: A ``.safetensors`` file.
        block: An instruction set or rows and columns, as the student was trained with.
        overwrite: Whether a file at ``path`` may be replaced.

    Raises:
        FileExistsError: If there is something at ``path`` and ``overwrite`` is False.
        ValueError: If ``path`` does not end in ``.safetensors``, ``block`` is none, ``network`` has a state that is no
            tensor, or its quantization is not in force.
    """
    from safetensors.torch import save_file

    path, size = Path(path), as_block(block)
    if path.suffix != ".safetensors":
        raise ValueError(f"`path` must end in '.safetensors', got {str(path)!r}.")
    with draft_of(path, overwrite=overwrite) as draft:
        dense, metadata = _with_few_bits(network) if quantized_layers(network) else (dict(_distinct(network)), {})
        codes, sparse, tensors, plan = _codes(network), {}, {}, {}
        for name, tensor in dense.items():
            layout = codes.get(name, _Layout(tuple(tensor.shape)))
            parts = _without_zeros(tensor, layout, size)
            if parts is None:
                tensors[name] = tensor
                continue
            kept, tensors[f"{name}.{_VALUES}"], tensors[f"{name}.{_BLOCKS}"] = parts
            plan[name], sparse[name] = asdict(layout), (kept, math.prod(block_grid(layout.shape, size)))
        metadata[_PLAN] = json.dumps({"version": VERSION, "block": size, "sparse": plan})
        save_file(tensors, str(draft), metadata=metadata)
    return SparseFile(path, path.stat().st_size, sum(tensor.nbytes for tensor in dense.values()), sparse)


def read_block_sparse(network: nn.Module, path: str | Path) -> nn.Module:
    """A network from a file of :func:`write_block_sparse`.

    Args:
        network: Built as the one that was written, before any quantization; filled, and quantized, in place.
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
    state, metadata = _load(path)
    plan = json.loads(metadata.pop(_PLAN, "{}"))
    if plan.get("version") != VERSION:
        raise ValueError(
            f"{str(path)!r} holds no blocks of version {VERSION}; `write_block_sparse` writes them. Dense weights are "
            "read by `load_network`."
        )
    for name, stored in plan["sparse"].items():
        layout = _Layout(**stored | {"shape": tuple(stored["shape"])})
        parts = state.pop(f"{name}.{_VALUES}"), state.pop(f"{name}.{_BLOCKS}")
        state[name] = _with_zeros(*parts, layout, as_block(plan["block"]))
    if metadata:
        return _fill_quantized(network, path, state, metadata)
    own = network.state_dict(keep_vars=True)
    given = {_identity(own[name]) for name in state if name in own}
    missing = [f"missing {name}" for name in own if name not in state and _identity(own[name]) not in given]
    wrong = [*missing, *(f"unknown {name}" for name in state if name not in own)]
    wrong += [
        f"{name} of shape {tuple(value.shape)}, not {tuple(own[name].shape)}"
        for name, value in state.items()
        if name in own and own[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"The network in {str(path)!r} is not this {type(network).__name__}: {'; '.join(wrong[:3])}.")
    network.load_state_dict(state, strict=False)
    return network.eval()


def _without_zeros(tensor: Tensor, layout: _Layout, block: Block) -> tuple[int, Tensor, Tensor] | None:
    """How many blocks are kept, their numbers and one bit per block; ``None`` where that would not be smaller."""
    if len(layout.shape) < 2 or tensor.numel() == 0:
        return None
    numbers = layout.unpacked(tensor)
    nonzero = (numbers != layout.zero).flatten(1)
    rows, columns = block_grid(layout.shape, block)
    filled = nonzero.new_zeros(rows * block[0], columns * block[1])
    filled[: nonzero.shape[0], : nonzero.shape[1]] = nonzero
    mask = filled.view(rows, block[0], columns, block[1]).any(dim=3).any(dim=1)
    values = layout.packed(numbers[element_mask(mask, layout.shape, block)])
    blocks = pack_bits(mask.int(), 1)
    return None if values.nbytes + blocks.nbytes >= tensor.nbytes else (int(mask.sum()), values, blocks)


def _with_zeros(values: Tensor, blocks: Tensor, layout: _Layout, block: Block) -> Tensor:
    """The tensor that :func:`_without_zeros` was given."""
    grid = block_grid(layout.shape, block)
    mask = unpack_bits(blocks, 1, math.prod(grid)).bool().view(grid)
    kept = element_mask(mask, layout.shape, block)
    numbers = values if layout.bits is None else unpack_bits(values, layout.bits, int(kept.sum()))
    return layout.packed(numbers.new_full(layout.shape, layout.zero).masked_scatter_(kept, numbers))


def _codes(network: nn.Module) -> dict[str, _Layout]:
    """How the packed codes of quantized layers are read, by their names in a file of ``write_packed``."""
    found = {}
    for name, layer in quantized_layers(network).items():
        grid = layer.weight_grid if layer.weight_bits <= 8 else None
        if isinstance(grid, Grid) and grid.has_zero:  # channels with bits of their own are no matrix of codes
            shape = (channels := output_channels(layer)), layer.weight.numel() // channels
            found[f"{name}.codes"] = _Layout(shape, layer.weight_bits, int(grid.zero_point) - grid.lowest)
    return found


def _with_few_bits(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What ``write_packed`` puts into a file."""
    with tempfile.TemporaryDirectory() as folder:
        write_packed(network, file := Path(folder) / "packed.safetensors")
        return _load(file)


def _fill_quantized(network: nn.Module, path: Path, state: dict[str, Tensor], metadata: dict[str, str]) -> nn.Module:
    """Let ``read_packed`` read what it would find in a file with the zeros."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.safetensors"
        save_file(state, str(file), metadata=metadata)
        try:
            return read_packed(network, file)
        except ValueError as error:
            raise ValueError(str(error).replace(str(file), str(path))) from error


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file, in memory of their own."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


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


def _identity(value: Tensor) -> Any:
    """What is the same for two names of one tensor."""
    if value.numel() == 0:
        return id(value)
    return value.data_ptr(), tuple(value.shape), value.stride(), value.dtype
