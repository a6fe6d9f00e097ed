"""Networks with few bits per weight and activation."""

from lightning_distill.quantization.alternation import MonotonicityReport, monotonicity_report
from lightning_distill.quantization.closed_forms import binary_quantize, ternary_quantize
from lightning_distill.quantization.fake_quantize import (
    Grid,
    RowGrid,
    blend,
    codes_of,
    fake_quantize,
    grid_of,
    lsq_gradient_scale,
)
from lightning_distill.quantization.integers import IntegerWeight, integer_linear, integer_weight
from lightning_distill.quantization.network import (
    calibrate,
    full_precision,
    prepare,
    quantized_layers,
    set_alpha,
    set_bits,
    unprepare,
)
from lightning_distill.quantization.onnx_export import OnnxReport, export_onnx
from lightning_distill.quantization.onnx_runtime import OnnxNetwork, onnx_latencies, onnx_latency, run_onnx
from lightning_distill.quantization.packed import pack_bits, read_packed, unpack_bits, write_packed
from lightning_distill.quantization.quantized_layer import QuantizedLayer
from lightning_distill.quantization.scales import (
    affine_scale,
    alternate_scale_and_codes,
    lsq_initial_scale,
    minmax_scale,
    mse_affine_scale,
    mse_scale,
)
from lightning_distill.quantization.size import LayerSize, SizeReport, size_report
from lightning_distill.quantization.spec import QuantSpec
from lightning_distill.quantization.surrogate import dsq_fake_quantize, soft_staircase
from lightning_distill.quantization.terms import (
    QuantizationError,
    SoftQuantized,
    soft_quantized_loss,
    weight_quantization_error,
)
from lightning_distill.quantization.torchao_export import to_torchao

__all__ = [
    "Grid",
    "IntegerWeight",
    "LayerSize",
    "MonotonicityReport",
    "OnnxNetwork",
    "OnnxReport",
    "QuantSpec",
    "QuantizationError",
    "QuantizedLayer",
    "RowGrid",
    "SizeReport",
    "SoftQuantized",
    "affine_scale",
    "alternate_scale_and_codes",
    "binary_quantize",
    "blend",
    "calibrate",
    "codes_of",
    "dsq_fake_quantize",
    "export_onnx",
    "fake_quantize",
    "full_precision",
    "grid_of",
    "integer_linear",
    "integer_weight",
    "lsq_gradient_scale",
    "lsq_initial_scale",
    "minmax_scale",
    "monotonicity_report",
    "mse_affine_scale",
    "mse_scale",
    "onnx_latencies",
    "onnx_latency",
    "pack_bits",
    "prepare",
    "quantized_layers",
    "read_packed",
    "run_onnx",
    "set_alpha",
    "set_bits",
    "size_report",
    "soft_quantized_loss",
    "soft_staircase",
    "ternary_quantize",
    "to_torchao",
    "unpack_bits",
    "unprepare",
    "weight_quantization_error",
    "write_packed",
]
