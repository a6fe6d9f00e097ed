import pytest
import torch
from torch import nn

from lightning_distill.losses import AuxiliaryHeads, auxiliary_head, head_tier, head_width
from lightning_distill.outputs import Outputs, Step
from lightning_distill.weighting import LinearDecay


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def step_with(features, classes=5, items=4, **more):
    return Step(None, Outputs(torch.zeros(items, classes), features=features), **more)


@pytest.mark.chapter("B06", api="lightning_distill.losses.auxiliary_head")
def test_heads_have_the_golden_numbers_of_parameters(golden):
    case = golden("aux_head_param_counts")
    for tier, count in case.expected.items():
        head = auxiliary_head(case.inputs["d"], case.inputs["K"], tier=tier, hidden=case.inputs["hidden"])
        assert parameters(head) == count
        assert head(torch.zeros(3, case.inputs["d"])).shape == (3, case.inputs["K"])
    assert sum(isinstance(layer, nn.Dropout) for layer in auxiliary_head(4, 3, tier="mlp3")) == 2


@pytest.mark.chapter("B06", api="lightning_distill.losses.head_tier")
def test_the_tiers_are_thirds_of_the_depth():
    assert [head_tier(layer, 12) for layer in (2, 4, 5, 8, 9, 11)] == [
        "linear",
        "linear",
        "mlp2",
        "mlp2",
        "mlp3",
        "mlp3",
    ]
    heads = AuxiliaryHeads(["a", "b", "c"], "tiered", layers=[4, 8, 9], depth=12, hidden=6)
    heads.build_for(step_with({name: torch.zeros(4, 7) for name in "abc"}))
    assert [parameters(head) for head in heads.heads] == [7 * 5 + 5, 7 * 6 + 6 + 6 * 5 + 5, 48 + 42 + 35]


@pytest.mark.chapter("B07", api="lightning_distill.losses.head_width")
def test_width_grows_with_the_depth_or_shrinks(golden):
    case = golden("aux_head_hidden_width")
    layers = case.inputs["layers"].long().tolist()
    settings = {"base": case.inputs["base"], "minimum": case.inputs["minimum"]}
    found = [head_width(layer, case.inputs["L"], **settings) for layer in layers]
    assert found == case.expected["hidden"].long().tolist()
    inverse = [head_width(layer, 12, mode="inverse") for layer in range(1, 13)]
    assert inverse == [head_width(layer, 12) for layer in range(12, 0, -1)]
    assert head_width(1, 100) == 16
    for mode in ("proportional", "inverse"):
        heads = AuxiliaryHeads(["a", "b"], mode, layers=[3, 9], depth=12, hidden=256)
        heads.build_for(step_with({name: torch.zeros(4, 7) for name in "ab"}))
        assert [head[0].out_features for head in heads.heads] == [head_width(n, 12, mode=mode) for n in (3, 9)]


@pytest.mark.chapter("B08", api="lightning_distill.losses.AuxiliaryHeads")
def test_shared_heads_have_one_classifier_whose_gradient_is_the_sum():
    heads = AuxiliaryHeads(["a", "b"], "shared", hidden=6)
    features = {"a": torch.randn(4, 7), "b": torch.randn(4, 3, 2, 2)}
    heads.build_for(step_with(features))
    assert parameters(heads) == (7 * 6 + 6) + (3 * 6 + 6) + 5 * 6 + 2 * 5
    for head in heads.heads:
        nn.init.normal_(head.bias)
    logits = heads.logits(step_with(features))
    shared = heads.heads[0].shared.weight
    assert shared is heads.heads[1].shared.weight
    (total,) = torch.autograd.grad(logits[0].square().sum() + logits[1].square().sum(), shared, retain_graph=True)
    parts = [torch.autograd.grad(said.square().sum(), shared, retain_graph=True)[0] for said in logits]
    torch.testing.assert_close(total, parts[0] + parts[1])
    first = heads.heads[0]
    expected = shared @ torch.relu(first.phi(features["a"])).T + first.bias.unsqueeze(1)
    torch.testing.assert_close(logits[0], expected.T)


def test_heads_read_means_over_maps_and_over_positions_that_are_no_padding():
    heads = AuxiliaryHeads(["map", "tokens"], "linear")
    maps, tokens = torch.randn(2, 3, 4, 5), torch.randn(2, 6, 7)
    positions = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(heads.read(maps, "map", positions), maps.mean(dim=(2, 3)))
    expected = torch.stack([tokens[0, :2].mean(dim=0), tokens[1].mean(dim=0)])
    torch.testing.assert_close(heads.read(tokens, "tokens", positions), expected)
    nowhere = torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(heads.read(tokens, "tokens", nowhere), torch.zeros(2, 7))
    signal = AuxiliaryHeads(["signal"], channel_dim=1)
    torch.testing.assert_close(signal.read(tokens, "signal"), tokens.mean(dim=2))
    flat = AuxiliaryHeads(["map"], pool="flatten")
    assert torch.equal(flat.read(maps, "map"), maps.movedim(1, -1).flatten(1))


def test_heads_of_a_language_model_read_the_tokens_that_count():
    heads = AuxiliaryHeads(["layer"], "linear")
    tokens = torch.randn(2, 3, 7)
    positions = torch.tensor([[1, 0, 0], [1, 1, 0]]).bool()
    step = step_with({"layer": tokens}, items=3, positions=positions, token_items=True)
    heads.build_for(step)
    expected = heads.heads[0](torch.stack([tokens[0, 0], tokens[1, 0], tokens[1, 1]]))
    torch.testing.assert_close(heads.logits(step)[0], expected)


def test_heads_are_asked_once_per_step():
    heads = AuxiliaryHeads(["a"], "mlp2", dropout=0.5)
    step = step_with({"a": torch.randn(4, 7)})
    heads.build_for(step)
    assert heads.logits(step)[0] is heads.logits(step)[0]
    assert not torch.equal(heads.logits(step_with(step.student.features))[0], heads.logits(step)[0])  # dropout


def test_weights_follow_the_schedule_and_the_knob():
    heads = AuxiliaryHeads(["a", "b"], weights=[0.4, 0.2], schedule=LinearDecay(0.5))
    step = step_with({}, progress=0.5)
    assert heads.weights_at(step) == pytest.approx([0.3, 0.15])
    heads.weights = [1.0, 0.0]
    assert heads.weights_at(step) == pytest.approx([0.75, 0.0])


def test_a_state_dict_builds_the_heads_that_it_holds():
    features = {"a": torch.randn(4, 7), "b": torch.randn(4, 3, 2, 2)}
    for kind in ("tiered", "shared"):
        heads, loaded = (AuxiliaryHeads(["a", "b"], kind) for _ in range(2))
        heads.build_for(step_with(features))
        loaded.load_state_dict(heads.state_dict())
        found, expected = (side.eval().logits(step_with(features)) for side in (loaded, heads))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"a": torch.zeros(4), "b": torch.zeros(4, 7)}, r"on 'a' has no usable shape: .* of shape \(4,\)"),
        (
            {"a": torch.zeros(4, 7).long(), "b": torch.zeros(4, 7)},
            "on 'a' has no usable shape: the layer gives torch.int",
        ),
        ({"a": torch.zeros(9, 7), "b": torch.zeros(4, 7)}, "layer 'a' has 9 rows for 4 samples"),
        (
            {"b": torch.zeros(4, 7), "a": torch.zeros(4, 7)},
            r"out of order: the network computes them as \['b', 'a'\], got \['a', 'b'\]",
        ),
    ],
)
def test_refuses_layers_that_no_head_can_read(features, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryHeads(["a", "b"]).build_for(step_with(features))


def test_refuses_layers_without_the_positions_of_the_tokens():
    step = step_with(
        {"a": torch.zeros(2, 7)}, items=3, positions=torch.tensor([[1, 0], [1, 1]]).bool(), token_items=True
    )
    with pytest.raises(ValueError, match=r"needs a value for each token, \(B, T, width\)"):
        AuxiliaryHeads(["a"]).build_for(step)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"taps": []}, r"`taps` must name at least one layer, and each once, got \[\]"),
        ({"taps": "blocks.1"}, "`taps` must name at least one layer, and each once, got 'blocks.1'"),
        ({"taps": ["a", "a"]}, "each once"),
        ({"taps": ["a"], "kind": "big"}, "`kind` must be one of linear, .*, got 'big'"),
        ({"taps": ["a"], "pool": "max"}, "`pool` must be one of mean, flatten, got 'max'"),
        ({"taps": ["a", "b"], "weights": [0.3]}, "`weights` must have one number for each of the 2 heads, got 1"),
        ({"taps": ["a"], "weights": -1.0}, "weight of the head on 'a' must not be negative, got -1.0"),
        ({"taps": ["a"], "hidden": 0}, "`hidden` must be positive, got 0"),
        ({"taps": ["a"], "dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0"),
        ({"taps": ["a", "b"], "layers": [3]}, "`layers` must be 2 rising numbers"),
        ({"taps": ["a", "b"], "layers": [3, 3]}, r"`layers` must be 2 rising numbers .*, got \[3, 3\]"),
        ({"taps": ["a"], "layers": [5], "depth": 4}, "`layer` must be from 1 to the depth of the network, 4, got 5"),
    ],
)
def test_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryHeads(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: head_tier(0, 4), "`layer` must be from 1 to the depth of the network, 4, got 0"),
        (lambda: head_width(1, 4, base=8, minimum=16), "`minimum` must be positive and at most `base`, got 16 and 8"),
        (lambda: head_width(1, 4, mode="up"), "`mode` must be 'proportional' or 'inverse', got 'up'"),
        (lambda: auxiliary_head(4, 3, tier="mlp4"), "`tier` must be one of linear, mlp2, mlp3, got 'mlp4'"),
    ],
)
def test_functions_refuse_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
