"""Operations and bytes of each layer of a network, counted while it runs a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.hardware.operations import Operation, Readers, convolution_of, kind_of
from lightning_distill.modes import inference, run_batch
from lightning_distill.quantization import full_precision, quantized_layers, size_report

ROOT = "(network)"
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # PyTorch counts the GPU's only


@dataclass
class LayerCost:
    """What one layer does for one batch, without the layers inside it.

    Attributes:
        name: Its name in the network; :data:`ROOT` for what the network does itself.
        kind: Its class.
        calls: Operations of PyTorch that it starts; views are none.
        flops: Multiplications and additions of products of matrices, convolutions and attention: two per MAC.
        convolution_flops: Those of ``flops`` that are a convolution's.
        padded_flops: ``convolution_flops`` with the channels of a group rounded up to whole blocks of 16, as vector
            units compute them: 17 channels take as long as 32. Up to 4 input channels stay as they are.
        weight_bytes: Of parameters and buffers that are read, each as often as it is read, at ``weight_bits``.
        activation_bytes: Of everything else that operations read and write.
        weight_bits: Bits of a weight.
        compute_bits: Width of the arithmetic: the wider one of weights and inputs.
        activation_bits: Bits that the layer quantizes its inputs to; ``None`` if it does not.
        feeds_integers: Whether every reader of its output quantizes it, behind normalization, ReLU and views at most.
        operations: Each operation, as the kernels of a calibration need it.
    """

    name: str
    kind: str
    calls: int = 0
    flops: int = 0
    convolution_flops: int = 0
    padded_flops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    weight_bits: int = 32
    compute_bits: int = 32
    activation_bits: int | None = None
    feeds_integers: bool = False
    operations: tuple[Operation, ...] = ()

    @property
    def bytes(self) -> float:
        """Bytes read and written."""
        return self.weight_bytes + self.activation_bytes


def count_costs(
    model: nn.Module,
    batch: Any,
    *,
    run: Callable[[nn.Module, Any], Any] | None = None,
    bits: Mapping[str, int] | None = None,
) -> tuple[LayerCost, ...]:
    """Count what each layer of ``model`` does for one batch; in eval mode, without gradients.

    Functions called in a layer's ``forward`` count for that layer. Bytes are those of PyTorch's eager mode: every
    operation reads its inputs and writes its output, so nothing is fused and nothing stays in a cache. Of quantized
    layers the weights count with their bits; their steps, and fewer bytes of quantized inputs, do not.

    Args:
        model: Any network; it is left as it was.
        batch: What it reads.
        run: Lets the model read a batch. Default: ``model(batch)``, ``model(*inputs)`` of ``(inputs..., labels)``
            with only the first one, or ``model(**batch)`` of a mapping.
        bits: Layers, by name, whose weights count as if they had so many bits.

    Returns:
        One entry per layer that did something, in the order of the first use.

    Example:
        >>> [cost] = count_costs(nn.Sequential(nn.Linear(4, 2, bias=False)), torch.zeros(3, 4))
        >>> cost.name, cost.calls, cost.flops, cost.weight_bytes, cost.activation_bytes
        ('0', 1, 48, 32.0, 72.0)
    """
    counter = _Counter(model, bits or {})
    with ExitStack() as stack:
        stack.enter_context(inference(model))
        stack.enter_context(full_precision(model))
        stack.enter_context(_without_fused_attention())
        stack.callback(counter.remove)
        stack.enter_context(counter.flops)
        stack.enter_context(counter)
        counter.end((run or run_batch)(model, batch))
    return tuple(cost for cost in counter.costs.values() if cost.calls)


def alone(operation: Operation, cost: LayerCost) -> LayerCost:
    """What the layer would cost with one of its operations."""
    shape = operation.convolution
    return replace(
        cost,
        calls=1,
        flops=operation.flops,
        convolution_flops=operation.flops if shape else 0,
        padded_flops=operation.flops * shape.padding if shape else 0.0,
        weight_bytes=operation.parameters * cost.weight_bits / 8,
        activation_bytes=operation.activation_bytes,
        operations=(operation,),
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers; the weights of quantized layers packed at their bits, their steps included."""
    if quantized_layers(model):
        return size_report(model).bytes
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


class _Counter(TorchDispatchMode):
    """Books every operation on the innermost layer that is running."""

    def __init__(self, model: nn.Module, bits: Mapping[str, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
        self.costs: dict[str, LayerCost] = {}
        self._running: list[str] = []
        self._weights: dict[int, int] = {}  # bits of a value, by where it is stored
        self._bits: dict[str, tuple[int, int, int | None]] = {}
        quantized = quantized_layers(model)
        own = next((8 * p.element_size() for p in model.parameters() if p.is_floating_point()), 32)
        for tensor in (*model.parameters(), *model.buffers()):
            self._weights[_place(tensor)] = 8 * tensor.element_size()
        plan = {name: layer.weight_bits for name, layer in quantized.items()} | dict(bits)
        for name, weight in plan.items():
            layer: Any = model.get_submodule(name)
            self._weights[_place(layer.weight)] = weight
            inputs = layer.activation_bits if getattr(layer, "needs_range", False) else None
            self._bits[name] = (weight, max(weight, inputs or own), inputs)
        self._own = own
        self._readers = Readers(frozenset(name for name, (_, _, inputs) in self._bits.items() if inputs is not None))
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(_Enter(self, name or ROOT), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def enter(self, name: str, module: nn.Module) -> None:
        self._running.append(name)
        if name not in self.costs:
            weight, compute, inputs = self._bits.get(name, (self._own, self._own, None))
            kind = type(module).__name__.removeprefix("Quantized")
            self.costs[name] = LayerCost(name, kind, weight_bits=weight, compute_bits=compute, activation_bits=inputs)

    def end(self, output: Any) -> None:
        """The network has said ``output``."""
        for name in self._readers.end([value for value in tree_leaves(output) if isinstance(value, Tensor)]):
            self.costs[name].feeds_integers = True

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.flops.get_total_flops()
        result = func(*args, **(kwargs or {}))
        cost = self.costs.get(self._running[-1]) if self._running else None
        read = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        written = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        view, kind = _is_view(func, read, written), kind_of(func, args)
        self._readers.see(cost.name if cost else "", kind, read, written, view=view)
        if cost is None:
            return result
        if view:
            if not any(_place(value) in self._weights for value in read):  # a transposed weight belongs to its product
                cost.operations += (Operation("view"),)
            return result
        cost.calls += 1
        flops = self.flops.get_total_flops() - before
        cost.flops += flops
        shape = convolution_of(args, written[0]) if kind == "convolution" else None
        if shape is not None:
            cost.convolution_flops += flops
            cost.padded_flops += flops * shape.padding
        parameters = {value: _numbers(func, value, written) for value in read if _place(value) in self._weights}
        moved = float(sum(value.numel() * value.element_size() for value in written))
        moved += sum(value.numel() * value.element_size() for value in read if _place(value) not in self._weights)
        cost.weight_bytes += sum(count * self._weights[_place(value)] / 8 for value, count in parameters.items())
        cost.activation_bytes += moved
        if kind is not None:
            cost.operations += (Operation(kind, flops, sum(parameters.values()), moved, shape),)
        return result


@dataclass
class _Enter:
    counter: _Counter
    name: str

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.counter.enter(self.name, module)


def _numbers(func: Any, parameter: Tensor, written: list[Tensor]) -> int:
    """How many numbers of a parameter are read: of a table of embeddings the rows that come out."""
    looked_up = func.overloadpacket.__name__ == "embedding"
    return sum(value.numel() for value in written) if looked_up else parameter.numel()


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Of shapes ``(B, H, T, D)``, ``(B, H, S, D)`` and ``(B, H, S, V)``: two products of matrices."""
    batch, heads, length, width = query
    return int(2 * batch * heads * length * key[2] * (width + value[3]))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_view(func: Any, read: list[Tensor], written: list[Tensor]) -> bool:
    """Whether nothing was moved: the result lies where an input does, and that was not changed."""
    if func._schema.is_mutable or not written:
        return not written
    places = {_place(value) for value in read}
    return all(_place(value) in places for value in written)


@contextmanager
def _without_fused_attention() -> Iterator[None]:
    """Layers of ``nn.Transformer…`` run as one operation that no counter knows unless this is off."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
