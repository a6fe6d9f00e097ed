import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_distill.diagnostics import gradient_flow_profile


def deep_network(seed, depth=16, width=32):
    torch.manual_seed(seed)
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
    heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(depth // 4))
    return layers, heads


def losses(layers, heads, x, y):
    """The network's own loss, and that with the heads on every fourth layer; the last head is the main classifier."""
    said = []
    for number, layer in enumerate(layers, start=1):
        x = layer(x).tanh()
        if number % 4 == 0:
            said.append(F.cross_entropy(heads[number // 4 - 1](x), y))
    return said[-1], sum(said)


@pytest.mark.chapter("B14", api="lightning_distill.diagnostics.gradient_flow_profile")
@pytest.mark.parametrize("seed", range(5))
def test_auxiliary_heads_bring_the_gradient_to_the_first_layers(seed):
    layers, heads = deep_network(seed)
    x, y = torch.randn(64, 32), torch.randint(0, 10, (64,))
    alone, with_heads = losses(layers, heads, x, y)
    named = {str(i): layer for i, layer in enumerate(layers)}
    plain, supervised = gradient_flow_profile(alone, named), gradient_flow_profile(with_heads, named)
    assert plain.ratio < 3e-3
    assert supervised.ratio > 0.2
    assert list(plain.norms) == list(named)
    assert "first / last layer" in str(plain)
    with_heads.backward()  # the graph is still there
    norm = torch.stack([parameter.grad.square().sum() for parameter in layers[0].parameters()]).sum().sqrt()
    assert supervised.norms["0"] == pytest.approx(norm.item(), rel=1e-5)


def test_a_layer_without_a_way_to_the_loss_has_no_gradient():
    first, last = nn.Linear(2, 1), nn.Linear(2, 1)
    loss = first(torch.ones(1, 2)).sum()
    profile = gradient_flow_profile(loss, {"first": list(first.parameters()), "last": last})
    assert profile.norms == {"first": pytest.approx(3**0.5), "last": 0.0}
    assert profile.ratio == float("inf")
    assert first.weight.grad is None


@pytest.mark.parametrize(
    ("loss", "layers", "message"),
    [
        (torch.zeros(2), {}, r"must be a scalar with a graph, got shape \(2,\), requires_grad=False"),
        (torch.zeros(()), {}, "requires_grad=False"),
        (nn.Parameter(torch.zeros(())), {"a": nn.Linear(1, 1)}, r"at least two, .* got \['a'\]"),
        (
            nn.Parameter(torch.zeros(())),
            {"a": nn.Linear(1, 1), "b": nn.ReLU()},
            r"`layers` \['b'\] have no trainable parameter",
        ),
    ],
)
def test_refuses_bad_values(loss, layers, message):
    with pytest.raises(ValueError, match=message):
        gradient_flow_profile(loss, layers)
