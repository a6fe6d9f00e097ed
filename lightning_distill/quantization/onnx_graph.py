"""Changes of an ONNX graph that let runtimes compute with whole numbers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np


class Graph:
    """An ONNX graph with its constants as arrays, by name."""

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.graph = model.graph
        self.constants: dict[str, np.ndarray[Any, Any]] = {
            tensor.name: numpy_helper.to_array(tensor) for tensor in self.graph.initializer
        }
        self.maker = {name: node for node in self.graph.node for name in node.output}
        self.readers = Counter(name for node in self.graph.node for name in node.input)
        self.readers.update(output.name for output in self.graph.output)

    def add(self, name: str, value: np.ndarray[Any, Any]) -> str:
        """A new constant, whose name starts with ``name``."""
        while name in self.constants or name in self.maker:
            name += "_"
        self.constants[name] = value
        self.readers[name] += 1
        return name

    def weight_of(self, node: Any) -> Any:
        """The node that makes the weight of a convolution out of codes that nobody else reads, or ``None``."""
        maker = self.maker.get(node.input[1])
        if maker is None or maker.op_type != "DequantizeLinear" or node.op_type != "Conv":
            return None
        alone = all(self.readers[name] == 1 for name in (node.input[1], *maker.input[:2]))  # zeros may be shared
        return maker if alone and all(name in self.constants for name in maker.input) else None

    def write_back(self) -> None:
        """Put the constants that are still read into the graph, small ones with 4 bits; drop the exporter's notes."""
        import onnx
        from onnx import numpy_helper

        read = {name for node in self.graph.node for name in node.input} | {out.name for out in self.graph.output}
        small = self._codes_of_four_bits()
        for node in self.graph.node:
            del node.metadata_props[:]
        del self.graph.initializer[:]
        for name, value in self.constants.items():
            if name not in read:
                continue
            if name in small:
                tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.INT4, dims=value.shape)
                tensor.raw_data = pack_int4(value)
            else:
                tensor = numpy_helper.from_array(np.asarray(value, order="C"), name)  # scalars stay scalars
            self.graph.initializer.append(tensor)

    def _codes_of_four_bits(self) -> set[str]:
        """Codes that fit, of layers that compute in floating point: integer kernels want 8 bits, and a zero point."""
        codes = {
            node.input[0]
            for node in self.graph.node
            if node.op_type == "DequantizeLinear" and len(node.input) == 2 and node.input[0] in self.constants
        }
        return {
            name
            for name in codes
            if self.constants[name].dtype == np.int8
            and self.readers[name] == 1
            and self.constants[name].min(initial=0) >= -8
            and self.constants[name].max(initial=0) <= 7
        }


def pack_int4(codes: np.ndarray[Any, Any]) -> bytes:
    """Two codes in a byte, the first one in the low half.

    Example:
        >>> pack_int4(np.array([1, -1, 7])).hex()
        'f107'
    """
    flat = codes.reshape(-1).astype(np.int8) & 0x0F
    flat = np.append(flat, np.zeros(len(flat) % 2, np.int8)).astype(np.uint8)
    return bytes((flat[0::2] | (flat[1::2] << 4)).tobytes())


def fold_batch_norms(graph: Graph) -> int:
    """Move the batch normalization behind a convolution into its steps and bias; its codes change their sign at most.

    Returns:
        How many were moved.
    """
    folded = 0
    for node in [node for node in graph.graph.node if node.op_type == "BatchNormalization"]:
        convolution = graph.maker.get(node.input[0])
        if convolution is None or convolution.op_type != "Conv" or graph.readers[node.input[0]] != 1:
            continue
        weight, statistics = graph.weight_of(convolution), list(node.input)[1:5]
        bias = convolution.input[2] if len(convolution.input) > 2 else ""
        if weight is None or any(name not in graph.constants for name in (*statistics, *([bias] if bias else []))):
            continue
        codes, scale = (graph.constants[name] for name in weight.input[:2])
        if scale.ndim > 1:
            continue
        gamma, beta, mean, variance = (graph.constants[name] for name in statistics)
        epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        sign = np.where(factor < 0, -1, 1).astype(np.int8) * (factor != 0)  # a step may not be 0: then all codes are
        graph.constants[weight.input[0]] = (codes * sign.reshape(-1, *[1] * (codes.ndim - 1))).astype(np.int8)
        graph.constants[weight.input[1]] = np.where(factor == 0, 1, scale * np.abs(factor)).astype(np.float32)
        before = graph.constants[bias] if bias else np.zeros_like(mean)
        name = graph.add(f"{weight.input[0]}.bias", ((before - mean) * factor + beta).astype(np.float32))
        del convolution.input[2:]
        convolution.input.append(name)
        del graph.maker[convolution.output[0]]
        convolution.output[0] = node.output[0]
        graph.maker[node.output[0]] = convolution
        graph.graph.node.remove(node)
        folded += 1
    return folded


def quantize_convolution_biases(graph: Graph) -> int:
    """Give biases of convolutions that read whole numbers 32 bits, in steps of the products they are added to.

    Returns:
        How many were changed.
    """
    from onnx import helper

    changed = 0
    for node in [node for node in graph.graph.node if node.op_type == "Conv" and len(node.input) > 2]:
        source, weight = graph.maker.get(node.input[0]), graph.weight_of(node)
        if source is None or source.op_type != "DequantizeLinear" or weight is None:
            continue
        steps, bias = graph.constants[source.input[1]], graph.constants.get(node.input[2])
        scale = (steps * graph.constants[weight.input[1]]).astype(np.float32)
        if bias is None or scale.ndim != 1:
            continue
        codes = np.round(bias.astype(np.float64) / scale)
        if np.abs(codes).max() >= 2**31:
            continue
        stem = weight.input[0]
        inputs = [
            graph.add(f"{stem}.bias_codes", codes.astype(np.int32)),
            graph.add(f"{stem}.bias_scale", scale),
            graph.add(f"{stem}.bias_zero_point", np.zeros(len(scale), np.int32)),
        ]
        dequantized = helper.make_node("DequantizeLinear", inputs, [f"{stem}.bias_dequantized"], axis=0)
        graph.graph.node.insert(list(graph.graph.node).index(node), dequantized)
        node.input[2] = dequantized.output[0]
        changed += 1
    return changed
