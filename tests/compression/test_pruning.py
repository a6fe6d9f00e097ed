import copy

import pytest
import torch
from torch import nn

from lightning_distill import Classification
from lightning_distill.compression import (
    channel_groups,
    magnitude_importance,
    prune_channels,
    pruned,
    taylor_importance,
)
from lightning_distill.compression.channels import per_channel
from lightning_distill.hardware import CostModel
from lightning_distill.networks import MLP, ConvNet2d, ResNet1d, from_config


class Mixed(nn.Module):
    """Groups, depthwise, a concatenation and a group normalization."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.mix = nn.Conv2d(24, 16, 1)
        self.grouped = nn.Conv2d(16, 32, 3, groups=4)
        self.norm = nn.GroupNorm(4, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.depthwise(torch.cat([self.a(x), self.b(x)], 1)).relu()
        return self.head(self.norm(self.grouped(self.mix(x).relu())).relu().mean((2, 3)))


NETWORKS = {
    "resnet": (ResNet1d, (2, 1, 40)),
    "convnet": (ConvNet2d, (2, 1, 8, 8)),
    "mlp": (lambda: MLP((64, 32, 32, 10)), (2, 64)),
    "mixed": (Mixed, (2, 3, 8, 8)),
}


@pytest.mark.chapter("D40", api="lightning_distill.compression.prune_channels")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_smaller_network_says_what_the_whole_one_says_when_dead_channels_go(name):
    build, shape = NETWORKS[name]
    network, x = build().eval(), torch.randn(shape)
    groups, _ = channel_groups(network, x)
    with torch.no_grad():  # the second half of each group's units is read by nobody
        for group in groups:
            units = max(group.units) + 1
            for part in group.slices:
                layer = network.get_submodule(part.name)
                if part.side == "in":
                    for position, channel in zip(part.positions, part.channels, strict=True):
                        if group.units[channel] >= units / 2:
                            local = position % layer.weight.shape[1]
                            layer.weight[:, local] = 0
    before = network(x)
    if name != "mixed":  # a group normalization sees channels that nobody reads
        batch = [(x, torch.zeros(2, dtype=torch.long))]
        report = prune_channels(network, x, keep=0.5, width=1, importance="taylor", batches=batch)
        torch.testing.assert_close(network(x), before, rtol=1e-4, atol=1e-5)
        assert all(layer.kept == tuple(range(layer.before // 2)) for layer in report.layers)
    else:
        report = prune_channels(network, x, keep=0.5, width=1)
        assert network(x).shape == before.shape
        assert report.channels == {"a": 4, "b": 8, "mix": 8, "grouped": 16}
    assert report.after < report.before
    assert set(report.left) == {"head"}


def test_channels_are_whole_vectors_and_at_least_one():
    network = ResNet1d()
    report = prune_channels(network, torch.randn(2, 1, 40), keep=0.5, width="avx512")
    assert set(report.channels.values()) == {16}
    again = pruned(ResNet1d(), [2, 1, 40], keep=report.channels)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert type(network.stem[0]) is nn.Conv1d
    assert set(prune_channels(ResNet1d(), torch.randn(2, 1, 40), keep=0.01).channels.values()) == {8}


def test_heads_of_attention_go_as_a_whole():
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    vit = from_config("vit", "image-classification", config | {"image_size": 16, "patch_size": 4})
    images = torch.randn(2, 3, 16, 16)
    report = prune_channels(vit, images, keep=0.5)
    heads = next(layer for layer in report.layers if "v_proj" in layer.name)
    assert len({channel // 8 for channel in heads.kept}) == 2
    assert heads.after == 16
    assert vit(images).logits.shape == (2, 2)


def test_taylor_is_the_gradient_of_gates():
    network = MLP((6, 5, 4, 3))
    x, y = torch.randn(7, 6), torch.randint(3, (7,))
    groups, _ = channel_groups(network, x)
    found = taylor_importance(network, groups, [(x, y)], Classification())
    first, second = torch.ones(5, requires_grad=True), torch.ones(4, requires_grad=True)
    hidden = network.blocks[1](network.blocks[0](x) * first) * second
    gates = torch.autograd.grad(nn.functional.cross_entropy(network.head(hidden), y), [first, second])
    torch.testing.assert_close(found["blocks.0.0"], gates[0].square())
    torch.testing.assert_close(found["blocks.1.0"], gates[1].square())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_largest_network_within_a_budget(scope):
    x, model = torch.randn(2, 64), CostModel(throughput=1e9)
    network = MLP((64, 64, 64, 10))
    limit = 0.5 * model.estimate(network, x).latency
    report = prune_channels(network, x, max_cost={"latency": limit}, model=model, width=1, scope=scope)
    assert 0.9 * limit < model.estimate(network, x).latency <= limit
    assert report.after < report.before
    unchanged = prune_channels(network, x, max_cost={"latency": limit}, model=model)
    assert unchanged.before == unchanged.after
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="the smallest network costs"):
        prune_channels(network, x, max_cost={"bytes": 10})
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of `keep` and `max_cost`"),
        ({"keep": 0.0}, r"`keep` must be in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, r"`keep` must be in \(0, 1\], got 1.5"),
        ({"keep": {"nothing": 3}}, "`keep` names 'nothing'"),
        ({"keep": {"head": 3}}, "its channels stay: they are outputs"),
        ({"keep": {"blocks.0.0": 0}}, "must be from 1 to 64, got 0"),
        ({"keep": 0.5, "skip": ["nothing"]}, "fits no layer"),
        ({"keep": 0.5, "width": 0}, "`width` must be positive"),
        ({"keep": 0.5, "importance": "taylor"}, "needs `batches`"),
        ({"keep": 0.5, "scope": "all"}, "`scope` must be"),
        ({"max_cost": {"money": 1}}, "`max_cost` must name some of"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune_channels(MLP(), torch.randn(2, 64), **arguments)


def test_layers_that_the_example_does_not_use_are_named():
    network = MLP()
    network.spare = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"does not use the layers \['spare'\]"):
        prune_channels(network, torch.randn(2, 64), keep=0.5)
    prune_channels(network, torch.randn(2, 64), keep=0.5, skip=["spare"])
    assert network.spare.weight.shape == (3, 3)


def test_shared_weights_stay():
    network = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    network[1].weight = network[0].weight
    with pytest.raises(ValueError, match="shares its weights with another layer"):
        prune_channels(network, torch.randn(2, 8), keep=0.5)


def test_where_the_search_has_no_end_channels_stay():
    config = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    llama = from_config("llama", "causal-lm", config | {"num_attention_heads": 4, "num_key_value_heads": 2})
    tokens, layers = torch.arange(6).view(1, 6), "model.layers"
    groups, left = channel_groups(llama, tokens, skip=[f"{layers}.1.*"])
    assert [set(group.layers) for group in groups] == [{f"{layers}.0.mlp.up_proj", f"{layers}.0.mlp.gate_proj"}]
    assert "finds no end" in left[f"{layers}.0.self_attn.q_proj"]
    assert left[f"{layers}.1.self_attn.q_proj"] == left[f"{layers}.1.mlp.up_proj"] == "skipped"
    report = prune_channels(llama, tokens, keep=0.5, skip=["*.1.*"])
    assert set(report.channels.values()) == {32}
    assert llama(tokens).logits.shape == (1, 6, 50)


def test_deep_concatenations_are_searched_to_their_end():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.layers = nn.ModuleList(nn.Conv2d(4 * n, 4, 3, padding=1) for n in range(1, 9))
            self.head = nn.Linear(36, 3)

        def forward(self, x):
            found = [self.stem(x)]
            for layer in self.layers:
                found.append(layer(torch.cat(found, 1)).relu())
            return self.head(torch.cat(found, 1).mean((2, 3)))

    groups, left = channel_groups(Dense(), torch.randn(2, 3, 8, 8))
    assert len(groups) == 9
    assert left == {"head": "they are outputs of the network"}


def test_magnitude_is_the_mean_over_layers_of_squared_weights():
    network = MLP((6, 5, 4))
    [group], _ = channel_groups(network, torch.randn(2, 6))
    rows = network.blocks[0][0].weight.detach().square().sum(1)
    columns = network.head.weight.detach().square().sum(0)
    expected = (rows / rows.mean() + columns / columns.mean()) / 2
    torch.testing.assert_close(magnitude_importance(network, group), expected)
    half = magnitude_importance(network.half(), group)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_inputs_of_grouped_convolutions_are_counted_in_their_group(groups):
    layer = nn.Conv1d(6, 12, 2, groups=groups)
    found = per_channel(layer, "in", layer.weight)
    size_in, size_out = 6 // groups, 12 // groups
    for channel in range(6):
        part, position = divmod(channel, size_in)
        of_group = layer.weight[part * size_out : (part + 1) * size_out, position]
        torch.testing.assert_close(found[channel], of_group.sum())


def test_taylor_is_a_mean_over_batches_and_leaves_the_network_as_it_was():
    network = MLP((6, 5, 3))
    network.head.weight.requires_grad_(False)
    batches = [(torch.randn(7, 6), torch.randint(3, (7,))) for _ in range(2)]
    groups, _ = channel_groups(network, batches[0][0])
    both, one, other = (
        taylor_importance(network, groups, some, Classification())["blocks.0.0"]
        for some in (batches, batches[:1], batches[1:])
    )
    assert not torch.allclose(one, other)
    torch.testing.assert_close(both, (one + other) / 2)
    assert not network.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())


def test_frozen_layers_stay_frozen():
    network = MLP((6, 16, 3))
    network.head.requires_grad_(False)
    prune_channels(network, torch.randn(2, 6), keep=0.5)
    assert {name: parameter.requires_grad for name, parameter in network.named_parameters()} == {
        "blocks.0.0.weight": True,
        "blocks.0.0.bias": True,
        "head.weight": False,
        "head.bias": False,
    }


def test_of_the_whole_network_the_least_important_channels_go():
    network = MLP((6, 32, 32, 3))
    with torch.no_grad():
        network.blocks[0][0].weight[::2] *= 1e-3
        network.blocks[1][0].weight[:, ::2] *= 1e-3
    report = prune_channels(network, torch.randn(2, 6), keep=0.75, width=1, scope="global")
    first, second = sorted(report.layers, key=lambda layer: layer.name)
    assert first.kept == tuple(range(1, 32, 2))
    assert second.after == 32
    assert first.importance > 0.999


@pytest.mark.parametrize("channels", [1, 37, 63])
def test_not_one_channel_more_would_fit(channels):
    x, network = torch.randn(2, 64), MLP((64, 64, 10))
    limit = CostModel(throughput=1e9).estimate(MLP((64, channels, 10)), x).size
    report = prune_channels(network, x, max_cost={"bytes": limit}, model=CostModel(throughput=1e9), width=1)
    assert report.channels == {"blocks.0.0": channels}


def test_the_random_control_is_the_same_in_each_call():
    first, second = (
        prune_channels(MLP((6, 64, 3)), torch.randn(2, 6), keep=0.5, importance="random").layers[0].kept
        for _ in range(2)
    )
    assert first == second != tuple(range(32))


def test_layers_that_go_together_cannot_get_different_numbers():
    keep = {"blocks.0.residual.1": 16, "blocks.0.shortcut.0": 24}
    with pytest.raises(ValueError, match="but they go together"):
        prune_channels(ResNet1d(), torch.randn(2, 1, 40), keep=keep)


def test_reasons_why_channels_stay():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.unread = nn.Linear(4, 1), nn.Linear(4, 8)
            self.blind, self.head = nn.Linear(8, 3), nn.Linear(1, 3)

        def forward(self, x):
            return self.head(self.one(x)) + 0.0 * self.blind(self.unread(x))

    groups, left = channel_groups(Odd(), torch.randn(2, 4))
    assert groups == ()
    assert left["one"] == "a single channel"
    assert left["unread"] == "no layer reads them"
    assert left["head"] == "they are outputs of the network"
