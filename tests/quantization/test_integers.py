"""Whole numbers say what the quantized layers say."""

import pytest
import torch
from torch import nn

from lightning_distill.quantization import QuantSpec, calibrate, integer_linear, prepare


def layer(weights=8, activations=8, **options):
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(32, 6))
    prepare(network, QuantSpec(weights=weights, activations=activations, **options))
    x = 2 * torch.randn(40, 32) + 0.7
    calibrate(network, [x])
    return network[0], x


@pytest.mark.chapter("D19", api="lightning_distill.quantization.integer_linear")
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("weights", [2, 4, 8])
def test_integer_sums_are_the_fake_quantized_ones(weights, granularity):
    quantized, x = layer(weights, granularity=granularity)
    torch.testing.assert_close(integer_linear(quantized, x), quantized(x).detach(), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(integer_linear(quantized, x), nn.functional.linear(x, quantized.weight), atol=1e-3)
    far = 100 * x  # beyond the range: clipped in both
    torch.testing.assert_close(integer_linear(quantized, far), quantized(far).detach(), rtol=1e-5, atol=1e-4)


def test_what_has_no_whole_numbers_is_refused():
    floats, x = layer(activations=None)
    with pytest.raises(ValueError, match="inputs stay in floating point: prepare it with `activations`"):
        integer_linear(floats, x)
    grouped, x = layer(granularity="group:8")
    with pytest.raises(ValueError, match="a step per group; an integer sum needs one per output channel"):
        integer_linear(grouped, x)
    wide, x = layer(weights=16)
    with pytest.raises(ValueError, match="16 bits is kept in floating point"):
        integer_linear(wide, x)
