import pytest
import torch

from lightning_distill.networks import MLP, ConvNet1d, ConvNet2d, ResNet1d
from lightning_distill.taps import Taps


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def conv_1d(inputs, outputs, kernel):
    """Weights and biases of the convolution, scale and shift of the normalization after it."""
    return inputs * outputs * kernel + outputs + 2 * outputs


@pytest.mark.parametrize(("widths", "length"), [((24, 24, 24), 5), ((12, 12, 12), 5), ((8, 16), 10)], ids=str)
def test_the_student_has_the_parameters_that_its_layers_add_up_to(widths, length):
    first, *rest = widths
    expected = conv_1d(1, first, 5)
    for inputs, outputs in zip(widths, rest, strict=False):
        expected += conv_1d(inputs, outputs, 5)
    expected += widths[-1] * length * 10 + 10
    assert parameters(ConvNet1d(widths)) == expected


def test_documented_sizes():
    """The counts that the docstrings and the reference comparison name."""
    assert parameters(ConvNet1d()) == 7_306
    assert parameters(ResNet1d()) == 60_902
    assert parameters(ConvNet1d((12, 12, 12))) == 2_218
    assert parameters(MLP((64, 64, 10))) == 64 * 64 + 64 + 64 * 10 + 10
    assert 8.3 < parameters(ResNet1d()) / parameters(ConvNet1d()) < 8.4


@pytest.mark.parametrize(
    ("network", "shape", "taps"),
    [
        (ConvNet1d((4, 6, 8)), (3, 1, 40), {"blocks.0": (3, 4, 20), "blocks.1": (3, 6, 10), "blocks.2": (3, 8, 5)}),
        (ConvNet1d((4, 6), classes=3, channels=2, length=33), (3, 2, 33), {"blocks.1": (3, 6, 9)}),
        (ResNet1d((4, 6)), (3, 1, 40), {"stem": (3, 4, 40), "blocks.0": (3, 4, 20), "blocks.1": (3, 6, 10)}),
        (ResNet1d((4,), classes=2, length=7), (3, 1, 7), {"blocks.0": (3, 4, 4)}),
        (MLP((64, 8, 6, 10)), (3, 1, 8, 8), {"blocks.0": (3, 8), "blocks.1": (3, 6), "head": (3, 10)}),
        (MLP((5, 2)), (3, 5), {"head": (3, 2)}),
        (ConvNet2d((4, 6, 8)), (3, 1, 8, 8), {"blocks.0": (3, 4, 8, 8), "blocks.2": (3, 8, 2, 2)}),
        (ConvNet2d((4, 6), classes=5, channels=3, size=9), (3, 3, 9, 9), {"blocks.1": (3, 6, 5, 5)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_taps_have_the_documented_shapes_and_every_parameter_gets_a_gradient(network, shape, taps):
    tapped = Taps(network, taps)
    with tapped.recording() as features:
        logits = network(torch.randn(shape))
    assert {name: tuple(feature.shape) for name, feature in features.items()} == taps
    assert logits.shape == (3, network.head.out_features)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_residual_block_without_residual_is_its_shortcut():
    block = ResNet1d((4,)).eval().blocks[0]
    torch.nn.init.zeros_(block.residual[-1].weight)
    x = torch.randn(2, 4, 10)
    torch.testing.assert_close(block(x), block.shortcut(x).relu())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConvNet1d(()), r"`widths` must be positive, got \(\)"),
        (lambda: ResNet1d((4, 0)), r"`widths` must be positive, got \(4, 0\)"),
        (lambda: ConvNet2d(classes=0), "`classes` must be positive, got 0"),
        (lambda: MLP((64,)), r"`sizes` needs at least the number of inputs and of outputs, got \(64,\)"),
    ],
)
def test_rejects_sizes_that_make_no_network(make, message):
    with pytest.raises(ValueError, match=message):
        make()
