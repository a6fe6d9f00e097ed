"""Bits of channels within a budget, and searches that end with them."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from lightning_distill import QADModule
from lightning_distill.bit_search import (
    BitSearchResult,
    PlanLoss,
    QuantizedWeights,
    RoundedWeights,
    allocate_bits,
    allocate_channels,
    channel_shares,
    channel_squared_errors,
    effective_bits,
    search_bits,
    squared_errors,
)
from lightning_distill.callbacks import BitSearch, MeanTeacher
from lightning_distill.datamodules import DigitsDataModule
from lightning_distill.losses import SoftTargets
from lightning_distill.networks import MLP
from lightning_distill.quantization import (
    QuantSpec,
    full_precision,
    prepare,
    quantized_layers,
    set_bits,
    size_report,
)
from lightning_distill.tasks import Classification, Regression
from tests.bit_search.test_quantized import quantized
from tests.bit_search.test_search import trained

BITS = (2, 4, 8)


def tables(channels, seed):
    """Falling errors of channels of two layers, and the sizes of the layers."""
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for layer, count in channels.items():
        drops = torch.rand(count, len(BITS), generator=generator) ** 4
        errors[layer] = drops.flip(1).cumsum(1).flip(1)
    return errors, {layer: 10 * count * (1 + place) for place, (layer, count) in enumerate(channels.items())}


def total(errors, plan):
    return sum(float(own[row, BITS.index(b)]) for layer, own in errors.items() for row, b in enumerate(plan[layer]))


def storage(sizes, plan):
    return sum(sizes[layer] / len(own) * sum(own) for layer, own in plan.items())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.45, 0.8, 1.0])
def test_channels_are_as_good_as_the_exact_programme_up_to_one_channel(seed, share):
    errors, sizes = tables({"a": 7, "b": 5}, seed)
    low, high = (sum(sizes.values()) * b for b in (BITS[0], BITS[-1]))
    budget = low + share * (high - low)
    plan = allocate_channels(errors, sizes, BITS, budget)
    assert storage(sizes, plan) <= budget * (1 + 1e-9)
    each = {f"{layer}{row}": own[row] for layer, own in errors.items() for row in range(len(own))}
    exact = allocate_bits(
        {name: dict(zip(BITS, row.tolist(), strict=True)) for name, row in each.items()},
        {name: {b: sizes[name[0]] / len(errors[name[0]]) * b for b in BITS} for name in each},
        budget,
    )
    least = sum(float(each[name][BITS.index(b)]) for name, b in exact.items())
    step = max(float((row[0] - row[-1]).max()) for row in each.values())
    assert least - 1e-6 <= total(errors, plan) <= least + step
    if share in (0.0, 1.0):
        assert total(errors, plan) == pytest.approx(least, abs=1e-6)


def test_no_plan_is_better_where_all_can_be_tried():
    better = 0
    for seed in range(20):
        errors, sizes = tables({"a": 3, "b": 2}, seed)
        budget = sum(sizes.values()) * 4.3
        found = total(errors, allocate_channels(errors, sizes, BITS, budget))
        every = ({"a": plan[:3], "b": plan[3:]} for plan in itertools.product(BITS, repeat=5))
        least = min(total(errors, plan) for plan in every if storage(sizes, plan) <= budget)
        assert found <= 1.6 * least
        better += found <= least + 1e-6
    assert better >= 10


def test_equal_channels_share_what_there_is_and_useless_bits_are_not_spent():
    errors = {"a": torch.tensor([[1.0, 0.5, 0.0]] * 10)}
    plan = allocate_channels(errors, {"a": 100}, BITS, 100 * 5.0)
    assert storage({"a": 100}, plan) <= 500
    assert sorted(set(plan["a"])) != [2]
    assert total(errors, plan) <= 5.0
    nothing = {"a": torch.zeros(10, 3)}
    assert allocate_channels(nothing, {"a": 100}, BITS, 800.0) == {"a": (2,) * 10}


def test_a_hundred_thousand_channels_are_no_matter():
    errors, sizes = tables({"a": 60_000, "b": 40_000}, 0)
    budget = sum(sizes.values()) * 3.1
    plan = allocate_channels(errors, sizes, BITS, budget)
    assert budget * 0.9999 <= storage(sizes, plan) <= budget * (1 + 1e-9)
    assert total(errors, plan) < 0.9 * total(errors, {layer: (2,) * len(own) for layer, own in errors.items()})


def test_bits_that_a_channel_shall_not_have_are_not_given_to_it():
    errors = {"a": torch.tensor([[math.inf, 0.1, 0.0], [0.2, math.inf, math.inf], [0.5, 0.2, math.inf]])}
    assert allocate_channels(errors, {"a": 30}, BITS, 240.0) == {"a": (8, 2, 4)}
    assert allocate_channels(errors, {"a": 30}, BITS, 80.0) == {"a": (4, 2, 2)}
    with pytest.raises(ValueError, match="`budget` is 79, but the cheapest plan costs 80"):
        allocate_channels(errors, {"a": 30}, BITS, 79.0)


def test_bad_tables_are_refused():
    errors, sizes = {"a": torch.ones(4, 3)}, {"a": 40}
    for arguments, message in (
        ((errors, sizes, (4, 2, 8), 100.0), r"`bits` must rise, got \[4, 2, 8\]"),
        ((errors, {"b": 40}, BITS, 100.0), r"same layers, got \['a'\] and \['b'\]"),
        (
            ({"a": torch.ones(4, 2)}, sizes, BITS, 100.0),
            r"`errors` of 'a' must be of shape \(channels, 3\), got \(4, 2\)",
        ),
        (
            ({"a": torch.ones(4, 3) / 0}, sizes, BITS, 100.0),
            "`errors` of 'a' must be numbers, infinite where .* and finite somewhere in each row",
        ),
        (({"a": torch.ones(4, 3) * math.nan}, sizes, BITS, 100.0), "`errors` of 'a' must be numbers"),
        (({"a": torch.tensor([[math.nan, 1.0, 0.0]])}, sizes, BITS, 100.0), "`errors` of 'a' must be numbers"),
        ((errors, sizes, BITS, 79.0), "`budget` is 79, but the cheapest plan costs 80. Raise it"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate_channels(*arguments)


def test_measured_errors_of_layers_are_divided_among_their_channels():
    errors, _ = tables({"a": 4, "b": 3}, 1)
    layers = {"a": {2: 3.0, 4: 1.0, 8: 0.0}, "b": {2: 0.5, 4: 0.25, 8: 0.125}}
    found = channel_shares(errors, layers, BITS)
    for layer, own in found.items():
        assert own.sum(dim=0).tolist() == pytest.approx(list(layers[layer].values()))
        torch.testing.assert_close((own[0] / own[1])[:2], (errors[layer][0] / errors[layer][1])[:2].double())
    assert channel_shares({"a": torch.zeros(2, 1)}, {"a": {2: 0.0}}, (2,))["a"].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("kind", [RoundedWeights, QuantizedWeights])
def test_errors_of_channels_sum_to_those_of_layers_and_plans_of_channels_are_put_in(kind):
    network, _ = trained() if kind is RoundedWeights else quantized()
    rounded = kind(network, BITS)
    layers = squared_errors(rounded)
    for name, own in channel_squared_errors(rounded).items():
        assert own.sum(dim=0).tolist() == pytest.approx(list(layers[name].values()), rel=1e-5)
        assert own.shape == (network.get_submodule(name).out_features, 3)
        weight = network.get_submodule(name).weight
        for column, choice in enumerate(BITS):
            with rounded.applied({name: choice}):
                now = weight if kind is RoundedWeights else network.get_submodule(name).quantized_weight()
                now = now.detach().clone()
            torch.testing.assert_close(own[:, column], (now - weight.detach()).square().sum(dim=1))
    name = "blocks.0.0"
    layer = network.get_submodule(name)
    before = layer.weight.detach().clone(), {key: value.clone() for key, value in network.state_dict().items()}
    bits = (2, 8, 4) * 4

    def weight():
        return (layer.weight if kind is RoundedWeights else layer.quantized_weight()).detach().clone()

    expected = torch.empty_like(before[0])
    for choice in BITS:
        with rounded.applied({name: choice}):
            expected[[own == choice for own in bits]] = weight()[[own == choice for own in bits]]
    with rounded.applied({name: bits}):
        assert torch.equal(weight(), expected)
    assert all(torch.equal(value, before[1][key]) for key, value in network.state_dict().items())
    assert kind is RoundedWeights or layer.bits == 8


@pytest.mark.parametrize("prepared", [False, True])
def test_a_search_by_channels_is_within_the_budget_and_no_worse_than_one_by_layers(prepared):
    network, batches = quantized() if prepared else trained()
    settings = {"effective_bits": 2.5, "bits": (2, 3, 4, 8)}
    layers = search_bits(network, batches, **settings)
    found = search_bits(network, batches, granularity="channel", **settings)
    assert found.loss < layers.loss
    assert found.effective_bits <= 2.5 + 1e-9
    assert found.cost == found.effective_bits
    assert any(isinstance(bits, tuple) for bits in found.plan.values())
    kind = QuantizedWeights if prepared else RoundedWeights
    loss = PlanLoss(network, kind(network, settings["bits"]), batches, Classification())
    assert loss(found.plan) == pytest.approx(found.loss)
    again = BitSearchResult.from_dict(json.loads(json.dumps(found.as_dict())))
    assert (again.plan, again.loss) == (found.plan, found.loss)
    assert "  channels: " in str(found)
    if prepared:
        set_bits(network, found.plan)
    else:
        prepare(network, overrides=found.plan, skip=[] if len(found.plan) == 3 else ["head"])
    assert size_report(network).average_bits == pytest.approx(effective_bits(found.plan, found.sizes))


def test_a_search_by_channels_of_a_regression_and_of_a_table():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(24, 6))
    batches = [(torch.randint(0, 5, (50, 3)), torch.zeros(50, 6))]  # most rows of the table are never read
    found = search_bits(network, batches, effective_bits=4.0, bits=BITS, granularity="channel")
    table = found.plan["0"]
    assert isinstance(table, int) or set(table[5:]) != {2}
    found = search_bits(network, batches, effective_bits=4.0, bits=BITS, granularity="channel", task=Regression())
    assert found.effective_bits <= 4.0


def test_what_has_no_bits_of_channels_is_refused():
    network, batches = trained()
    for settings, message in (
        ({"granularity": "row"}, "`granularity` must be 'layer' or 'channel', got 'row'"),
        ({"granularity": "channel", "bits": (4, 12)}, r"`bits` are 1 to 8, got `effective_bits` and \[4, 12\]"),
    ):
        with pytest.raises(ValueError, match=message):
            search_bits(network, batches, effective_bits=4.0, **settings)
    with pytest.raises(ValueError, match="the budget is `effective_bits` or `max_bytes`, and `bits` are 1 to 8"):
        BitSearch(max_latency=1.0, cost_model="ideal", granularity="channel")
    prepare(network, QuantSpec(4, granularity="tensor"))
    with pytest.raises(ValueError, match=r"The channels of the layers \['blocks\.0\.0', .* share one step"):
        search_bits(network, batches, effective_bits=4.0, granularity="channel")


def test_the_callback_gives_a_student_bits_of_channels_and_a_resumed_run_keeps_them(make_trainer, tmp_path):
    def run(steps, ckpt_path=None, **trainer_settings):
        torch.manual_seed(0)
        module = QADModule(MLP((64, 16, 10)), alpha=0.3)
        search = BitSearch(3.0, bits=(2, 4, 8), granularity="channel", start_step=3, samples=64, points=0)
        search.folder = str(tmp_path / "bits")
        trainer = make_trainer(max_steps=steps, callbacks=[search], **trainer_settings)
        trainer.fit(module, datamodule=DigitsDataModule(seed=0), ckpt_path=ckpt_path)
        return trainer, module, search

    _, whole, search = run(12)
    layers = quantized_layers(whole.student)
    assert {name: layer.bits for name, layer in layers.items()} == search.result.plan
    assert any(isinstance(layer.bits, tuple) for layer in layers.values())
    assert (tmp_path / "bits" / "bits.png").stat().st_size > 5000
    trainer, _, _ = run(6)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, again = run(12, tmp_path / "half.ckpt")
    assert again.result.plan == search.result.plan
    for (name, own), other in zip(whole.student.named_parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(own, other), name
    with full_precision(whole.student), full_precision(resumed.student):
        x = torch.randn(3, 64)
        assert torch.equal(whole.student(x), resumed.student(x))


def test_a_mean_teacher_goes_on_where_the_student_gets_bits_of_channels(make_trainer, tmp_path):
    torch.manual_seed(0)
    module = QADModule(MLP((64, 16, 10)), None, alpha=0.3, terms={"soft": SoftTargets()})
    search = BitSearch(3.0, bits=(2, 4, 8), granularity="channel", start_step=3, samples=64, points=0)
    search.folder = str(tmp_path)
    trainer = make_trainer(max_steps=8, callbacks=[MeanTeacher(momentum=0.9), search])
    trainer.fit(module, datamodule=DigitsDataModule(seed=0))
    assert module.teacher.updates == 8
    assert any(isinstance(layer.bits, tuple) for layer in quantized_layers(module.student).values())
