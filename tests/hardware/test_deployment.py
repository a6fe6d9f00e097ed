"""What suits a machine: tiles, formats, channels, folding of normalizations."""

import copy
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_distill.hardware import (
    TARGETS,
    Arithmetic,
    Target,
    align_channels,
    deployment_check,
    find_fusions,
    fold_batch_norms,
    target,
    tile_bytes,
    tile_size,
)
from lightning_distill.networks import MLP, ConvNet2d, ResNet1d, from_config
from lightning_distill.quantization import QuantSpec, calibrate, prepare

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def quantized(network, spec=None, **arguments):
    network = prepare(network.eval(), spec or QuantSpec(8, activations=8), **arguments)
    calibrate(network, [X])
    return network


def trained(network, x):
    """With statistics of batch normalization that are not those of the start."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.uniform_(module.bias, -1.0, 1.0)
    network.train()
    with torch.no_grad():
        network(x)
    return network.eval()


# ---------------------------------------------------------------- targets


@pytest.mark.chapter("X7", api="lightning_distill.hardware.tile_size")
def test_tiles_are_those_of_the_golden_case(golden):
    case = golden("exercise7_tiles")
    tile, l1, expected = case.inputs["tile"], case.inputs["l1_bytes"], case.expected
    assert tile_bytes(tile) == expected["int8_ab_int32_c"]
    assert tile_bytes(tile, bits=32) == expected["fp32_three"]
    assert tile_size(l1) == expected["largest_multiple_of_16_tile_int8"]
    phone = target("cortex-a78")
    assert phone.computes(8, integer=True).macs == expected["macs_per_sdot"]
    assert phone.l1_bytes == l1


@pytest.mark.chapter("X7")
@pytest.mark.parametrize("l1", [6 * 256, 5000, 32 * 1024, 48 * 1024, 64 * 1024])
@pytest.mark.parametrize(("bits", "multiple"), [(8, 16), (8, 4), (32, 8)])
def test_the_largest_tile_fits_and_the_next_does_not(l1, bits, multiple):
    side = tile_size(l1, bits=bits, multiple=multiple)
    assert side % multiple == 0
    assert 2 * side**2 * bits // 8 + 4 * side**2 <= l1
    assert tile_bytes(side + multiple, bits=bits) > l1


def test_every_target_computes_in_float32_and_8_bits_fill_whole_vectors():
    assert set(TARGETS) == {"x86-avx512", "arm-neon", "cortex-a78", "gpu-tensor-core"}
    for name, one in TARGETS.items():
        assert one.name == name
        assert one.source
        assert one.computes(32, integer=False).bits == 32
        whole = one.computes(5, integer=True)
        assert whole.bits == 8
        assert whole.multiple * 8 % (8 * one.alignment) == 0
        assert one.computes(16, integer=True) is None
    assert target("cortex-a78").computes(16, integer=False).bits == 16
    assert target("arm-neon").computes(16, integer=False).bits == 32


def test_refuses_impossible_targets_and_tiles():
    with pytest.raises(ValueError, match=r"one of \['arm-neon', 'cortex-a78', .*got 'phone'"):
        target("phone")
    with pytest.raises(ValueError, match=r"`arithmetic` must have one with float32, got \['int8 by A, 4 "):
        Target("x", (Arithmetic(8, True, 32, "A", 4, 4),), 1024, 16)
    with pytest.raises(ValueError, match="`l1_bytes` must be positive, got 0"):
        Target("x", (Arithmetic(32, False, 32, "A", 4, 4),), 0, 16)
    with pytest.raises(ValueError, match="`l1_bytes` is 1000, but tiles of 16 need 1536"):
        tile_size(1000)
    with pytest.raises(ValueError, match="`multiple` must be positive, got 0"):
        tile_size(1000, multiple=0)
    with pytest.raises(ValueError, match="`tile` must be positive, got 0"):
        tile_bytes(0)


# ---------------------------------------------------------------- folding


@pytest.mark.chapter("D45", api="lightning_distill.hardware.fold_batch_norms")
@pytest.mark.parametrize(("make", "x"), [(ConvNet2d, X), (ResNet1d, torch.randn(4, 1, 40))])
def test_folding_keeps_the_outputs(make, x):
    network = trained(make(), x)
    expected, before = network(x), copy.deepcopy(network)
    pairs = fold_batch_norms(network)
    assert len(pairs) == sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in before.modules())
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(network.get_submodule(pairs[0][0]).weight, before.get_submodule(pairs[0][0]).weight)
    assert find_fusions(network).pairs == ()


class Odd(nn.Module):
    """Normalizations of which one can be folded and the others not."""

    def __init__(self):
        super().__init__()
        self.good, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.twice, self.norm_twice = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.read, self.norm_read = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.bare = nn.BatchNorm2d(4)
        self.own, self.batch = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.line, self.norm_line = nn.Linear(4, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        x = F.relu(self.norm(self.good(x)))
        x = self.twice(self.norm_twice(self.twice(x)))
        y = self.read(x)
        x = self.bare(self.norm_read(y) + y)
        return self.norm_line(self.line(self.batch(self.own(x)).mean(dim=(2, 3))))


@pytest.mark.chapter("D45")
def test_only_what_nothing_else_reads_is_folded():
    network = trained(Odd(), X)
    found = find_fusions(network)
    assert found.pairs == (("good", "norm"), ("line", "norm_line"))
    assert found.relu == ("norm",)
    assert found.rest == ("norm_twice", "norm_read", "bare", "batch")
    expected = network(X)
    assert fold_batch_norms(network) == found.pairs
    torch.testing.assert_close(network(X), expected, rtol=1e-5, atol=1e-5)
    row = deployment_check(network, X, "arm-neon")["batch norm"]
    assert (row.passed, row.layers) == (False, found.rest)


class Untraceable(nn.Module):
    """Branches on values, which symbols do not have."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.bare = nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.bare(x * 2) if x.sum() > 1e9 else x


def test_of_a_network_that_cannot_be_traced_the_tensors_are_followed():
    network = Untraceable().eval()
    assert find_fusions(network) is None
    row = deployment_check(network, X, "cortex-a78")["batch norm"]
    assert row.passed is None
    assert row.layers == ("bare",)
    assert "cannot be traced" in row.detail
    network.bare = nn.Identity()
    row = deployment_check(network, X, "cortex-a78")["batch norm"]
    assert row.passed is None
    assert "all 1 can be folded" in row.detail
    assert not network.conv._forward_hooks
    with pytest.raises(ValueError, match=r"`torch.fx` cannot trace Untraceable[\s\S]*Fold the parts"):
        fold_batch_norms(network)


def test_shared_layers_are_not_folded():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    network.append(nn.BatchNorm2d(4))
    network[3].weight = network[2].weight
    assert find_fusions(network).pairs == (("0", "1"),)
    layer = nn.Conv2d(4, 4, 1)
    network = nn.Sequential(layer, nn.BatchNorm2d(4), layer, nn.BatchNorm2d(4)).eval()
    assert find_fusions(network).pairs == ()
    assert fold_batch_norms(network) == ()


def test_refuses_to_fold_while_training_and_quantized_networks():
    with pytest.raises(ValueError, match=r"call `network.eval\(\)` first"):
        fold_batch_norms(ConvNet2d())
    with pytest.raises(ValueError, match="The network is quantized: `export_onnx` folds"):
        fold_batch_norms(quantized(ConvNet2d()))


# ---------------------------------------------------------------- the check


@pytest.mark.chapter("X7", api="lightning_distill.hardware.deployment_check")
def test_an_unaligned_network_fails_on_a_phone_and_aligned_it_passes():
    widths = (20, 40, 40)
    report = deployment_check(quantized(ConvNet2d(widths)), X, "cortex-a78")
    assert not report.passed
    assert [row.item for row in report.rows if row.passed is False] == ["channels"]
    row = report["channels"]
    assert row.layers == ("blocks.0.0", "blocks.1.0", "blocks.2.0")
    assert "blocks.1.0 reads 20 (take 16) and makes 40 (take 48)" in row.detail
    assert "int8 by SDOT, 16 multiply-adds each" in report["formats"].detail
    assert "64x64, 24,576 of 32,768" in report["tiles"].detail
    assert str(report).endswith("cortex-a78: 1 of 6 rows fail")
    aligned = [align_channels(width, 16, mode="nearest") for width in widths]
    report = deployment_check(quantized(ConvNet2d(aligned)), X, "cortex-a78")
    assert report.passed
    assert str(report).endswith("nothing found that does not suit it")
    assert "FAILS" not in str(report)
    assert "all 3 can be folded into the layer before, 3 with a ReLU behind: export_onnx" in report["batch norm"].detail


@pytest.mark.chapter("D45", api="lightning_distill.hardware.deployment_check")
def test_layers_that_fall_back_to_float_are_named():
    network = quantized(
        MLP((64, 64, 64, 64, 64, 10)),
        overrides={
            "blocks.1.0": QuantSpec(4),
            "blocks.2.0": QuantSpec(8, activations=8, granularity="group:32"),
            "blocks.3.0": QuantSpec(4, activations=8),
        },
        skip=["head"],
    )
    report = deployment_check(network, X, "x86-avx512")
    assert report["formats"].layers == ("blocks.1.0", "blocks.2.0")
    assert "blocks.1.0: inputs are not quantized" in report["formats"].detail
    assert "blocks.2.0: steps per 'group:32'" in report["formats"].detail
    assert report["float layers"].layers == ("blocks.1.0", "blocks.2.0", "head")
    assert report["channels"].passed
    own = Target("old", (Arithmetic(32, False, 32, "FMA", 4, 4),), 32 * 1024, 16)
    assert "no whole numbers of 8 bits" in deployment_check(network, X, own)["formats"].detail
    assert deployment_check(network, X, own)["formats"].layers == tuple(f"blocks.{i}.0" for i in range(4))
    widened = deployment_check(quantized(MLP((64, 64, 10)), QuantSpec(4, activations=8)), X, "arm-neon")["formats"]
    assert widened.passed
    assert "fewer bits are widened, no faster than int8: blocks.0.0, head" in widened.detail
    assert deployment_check(MLP((64, 10)), X, "arm-neon")["formats"].passed is None


@pytest.mark.parametrize(
    ("layer", "bad"),
    [
        (nn.Conv2d(16, 64, 1, groups=4), True),  # a group reads 4
        (nn.Conv2d(64, 32, 1, groups=4), True),  # a group makes 8
        (nn.Conv2d(64, 64, 1, groups=4), False),
        (nn.Conv2d(16, 16, 1, groups=16), False),  # depthwise
        (nn.Conv2d(16, 24, 1), True),
        (nn.Conv2d(16, 32, 1), False),
    ],
)
def test_channels_of_groups_count(layer, bad):
    last = nn.Conv2d(layer.out_channels, 3, 1)
    network = quantized(nn.Sequential(nn.Conv2d(1, layer.in_channels, 1), layer, last))
    assert ("1" in deployment_check(network, X, "cortex-a78")["channels"].layers) == bad


def test_weights_with_gaps_and_odd_addresses_are_found():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4))
    report = deployment_check(network, X, "cortex-a78")
    assert report["memory"].passed
    assert "channels_last" in report["memory"].detail
    network.to(memory_format=torch.channels_last)
    assert "channels_last" not in deployment_check(network, X, "cortex-a78")["memory"].detail
    network[3].weight.data = torch.randn(64, 8).T
    network[4].weight.data = torch.randn(33)[1:].view(4, 8)
    row = deployment_check(network, X, "cortex-a78")["memory"]
    assert (row.passed, row.layers) == (False, ("3", "4"))


def test_batches_are_measured_here_and_say_so(monkeypatch):
    seen = []

    def measure(model, batch):
        seen.append(model(batch))
        return 0.5

    monkeypatch.setattr("lightning_distill.hardware.deployment.measure_latency", measure)
    network = MLP((64, 10))
    row = deployment_check(network, (X, torch.zeros(4)), "arm-neon", batch_sizes=(1, 4, 6))["batches"]
    assert [len(said) for said in seen] == [1, 4, 6]
    torch.testing.assert_close(seen[2], network(X[[0, 1, 2, 3, 0, 1]]))
    assert row.passed is None
    assert "measured on this machine" in row.detail
    assert row.detail.endswith("not on the target: 1: 2/s, 4: 8/s, 6: 12/s")
    monkeypatch.undo()
    unseen = prepare(MLP((64, 10)), QuantSpec(8, activations=8))  # before training, as the command line has it
    assert (
        "in floating point), not on the target: 2: "
        in deployment_check(unseen, X, "arm-neon", batch_sizes=(2,))["batches"].detail
    )
    assert "/s" in deployment_check(MLP((64, 10)), X, "arm-neon", batch_sizes=(2,))["batches"].detail


def test_a_transformer_is_checked_and_left_as_it_was():
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = from_config("bert", "sequence-classification", settings | {"intermediate_size": 30, "num_labels": 4})
    before = copy.deepcopy(model.state_dict())
    batch = MappingProxyType({"input_ids": torch.randint(0, 50, (2, 6))})
    report = deployment_check(model, batch, "cortex-a78", batch_sizes=(3,))
    assert "3: " in report["batches"].detail
    names = [f"bert.encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
    assert list(report["channels"].layers) == names
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refuses_what_cannot_be_checked():
    with pytest.raises(ValueError, match="The target must be one of"):
        deployment_check(MLP(), X, "phone")
    with pytest.raises(ValueError, match="`batch_sizes` must be positive, got 0"):
        deployment_check(MLP(), X, "cortex-a78", batch_sizes=(1, 0))
    with pytest.raises(ValueError, match="Flatten ran no linear layer and no convolution to check"):
        deployment_check(nn.Flatten(), X, "cortex-a78")
