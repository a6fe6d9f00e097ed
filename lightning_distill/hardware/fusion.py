"""Batch normalizations that can become a part of the layer before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.hooks import RemovableHandle

from lightning_distill.quantization import QuantizedLayer

PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Fusion:
    """Which batch normalizations follow a convolution or linear layer, and nothing else reads that one.

    Attributes:
        pairs: Names of layer and normalization that can be one.
        relu: Of these, the normalizations whose result goes to a ReLU alone.
        rest: Names of normalizations that cannot be folded.
        known: Whether the whole graph was seen. Otherwise the pairs are those in which the very tensor of the layer got
            to the normalization in one pass, and uses of it outside of layers are not seen.
    """

    pairs: tuple[tuple[str, str], ...]
    relu: tuple[str, ...]
    rest: tuple[str, ...]
    known: bool


def find_fusions(network: nn.Module) -> Fusion | None:
    """Read pairs that can be folded off the graph of ``network``; ``None`` if ``torch.fx`` cannot trace it."""
    try:
        graph = _Tracer().trace(network)
    except Exception:  # whatever the code of a network says to symbols
        return None
    modules = dict(network.named_modules(remove_duplicate=False))
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    once = {id(modules[name]): 0 for name in calls}
    for name, nodes in calls.items():
        once[id(modules[name])] += len(nodes)
    pairs, relu = [], []
    for name, nodes in calls.items():
        before = nodes[0].args[0] if nodes[0].args else None
        if not isinstance(modules[name], NORMS) or not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        first = modules[str(before.target)]
        alone = len(before.users) == 1 and once[id(first)] == 1 and once[id(modules[name])] == 1
        if alone and _foldable(first, modules[name]) and not _shared(network, first):
            pairs.append((str(before.target), name))
            users = list(nodes[0].users)
            if len(users) == 1 and _is_relu(users[0], modules):
                relu.append(name)
    return _fusion(network, pairs, relu, known=True)


class Followed:
    """Finds pairs while a network runs, for those that cannot be traced: whose very tensor a normalization gets."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._made: dict[int, tuple[str, Any]] = {}
        self._pairs: list[tuple[str, str]] = []
        self._handles: list[RemovableHandle] = []
        for name, module in network.named_modules():
            if isinstance(module, PRODUCTS):
                self._handles.append(module.register_forward_hook(_Made(self._made, name)))
            elif isinstance(module, NORMS):
                self._handles.append(module.register_forward_pre_hook(_Got(self._made, self._pairs, name)))

    def finish(self) -> Fusion:
        """Take the hooks off, and say what was seen."""
        for handle in self._handles:
            handle.remove()
        self._made.clear()
        modules = dict(self._network.named_modules())
        firsts, norms = [pair[0] for pair in self._pairs], [pair[1] for pair in self._pairs]
        pairs = [
            pair
            for pair in self._pairs
            if firsts.count(pair[0]) == norms.count(pair[1]) == 1 and _foldable(modules[pair[0]], modules[pair[1]])
        ]
        return _fusion(self._network, pairs, [], known=False)


def fold_batch_norms(network: nn.Module) -> tuple[tuple[str, str], ...]:
    """Fold batch normalizations into the layers before them, in place: outputs in eval mode stay what they are.

    Each normalization becomes ``nn.Identity``. For networks in floating point, at the end: there is no training
    afterwards. Of quantized ones :func:`~lightning_distill.quantization.export_onnx` folds them.

    Args:
        network: In eval mode, and such as ``torch.fx`` can trace. Linear layers before a normalization make ``(B, C)``.

    Returns:
        Names of the layers and normalizations that are one now.

    Raises:
        ValueError: If the network is in training mode, quantized, or cannot be traced.

    Example:
        >>> network = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU()).eval()
        >>> fold_batch_norms(network)
        (('0', '1'),)
    """
    if network.training:
        raise ValueError("Folding keeps the statistics of batch normalization: call `network.eval()` first.")
    if any(isinstance(module, QuantizedLayer) for module in network.modules()):
        raise ValueError("The network is quantized: `export_onnx` folds its normalizations.")
    found = find_fusions(network)
    if found is None:
        raise ValueError(
            f"`torch.fx` cannot trace {type(network).__name__}, so it is not known what else reads a layer's output. "
            "Fold the parts that it can trace: `fold_batch_norms(network.part)`."
        )
    for first, norm in found.pairs:
        layer, normalization = network.get_submodule(first), network.get_submodule(norm)
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        network.set_submodule(first, fuse(layer, normalization))
        network.set_submodule(norm, nn.Identity().eval())
    return found.pairs


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantizedLayer) or super().is_leaf_module(m, module_qualified_name)


@dataclass
class _Made:
    made: dict[int, tuple[str, Any]]
    name: str

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.made[id(output)] = (self.name, output)  # kept, so that no other tensor gets its place


@dataclass
class _Got:
    made: dict[int, tuple[str, Any]]
    pairs: list[tuple[str, str]]
    name: str

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        if inputs and isinstance(inputs[0], Tensor) and id(inputs[0]) in self.made:
            self.pairs.append((self.made[id(inputs[0])][0], self.name))


def _fusion(network: nn.Module, pairs: list[tuple[str, str]], relu: list[str], *, known: bool) -> Fusion:
    folded = {norm for _, norm in pairs}
    rest = [name for name, module in network.named_modules() if isinstance(module, NORMS) and name not in folded]
    return Fusion(tuple(pairs), tuple(relu), tuple(rest), known)


def _foldable(first: Any, norm: Any) -> bool:
    channels = getattr(first, "out_channels", None) or getattr(first, "out_features", None)
    return isinstance(first, PRODUCTS) and norm.running_mean is not None and channels == norm.num_features


def _shared(network: nn.Module, layer: nn.Module) -> bool:
    """Whether another layer has the same weight, which folding would part from it."""
    holders = [m for m in network.modules() for p in m.parameters(recurse=False) if p is layer.weight]
    return len(holders) > 1


def _is_relu(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.ReLU)
    return getattr(node.target, "__name__", node.target) in ("relu", "relu_")
