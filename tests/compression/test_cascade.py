"""Cascades of precisions: who answers, what it costs, what is refused."""

import copy
import itertools
import math

import pytest
import torch
from scipy.stats import entropy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill.compression import (
    CascadeMeasurements,
    PrecisionCascade,
    calibrate_cascade,
    confidence_of_entropy,
    dynamic_bits,
    evaluate_cascade,
    exit_confidence,
    measure_cascade,
    members_at_bits,
    pass_costs,
    plot_exit_curves,
)
from lightning_distill.hardware import bit_operations
from lightning_distill.networks import MLP, ConvNet2d, from_config
from lightning_distill.quantization import QuantSpec, calibrate, prepare, quantized_layers, set_bits
from lightning_distill.tasks import Regression, SequenceClassification


class Counting(nn.Module):
    """Counts the rows that it gets."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return self.inner(x)


def quantized(bits=8, **arguments):
    network = prepare(MLP((6, 16, 5)).eval(), QuantSpec(bits, activations=8))
    calibrate(network, [torch.randn(64, 6)])
    return network


def plain(sharpness=(1.0, 2.0, 4.0), **arguments):
    members = [Counting(nn.Linear(6, 5)) for _ in sharpness]
    for member, factor in zip(members, sharpness, strict=True):
        nn.init.normal_(member.inner.weight, std=factor)
    return PrecisionCascade(members, **arguments).eval()


def some_data(samples=300, seed=0):
    """Three networks of which later ones are better, and confidences that say something about being right."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(samples, 3, generator=generator) < torch.tensor([0.7, 0.8, 0.9])
    noise = torch.rand(samples, 2, generator=generator)
    return CascadeMeasurements(
        0.5 * noise + 0.5 * correct[:, :2], correct, (1.0, 2.0, 4.0), (2.0, 4.0, 8.0), ("2", "4", "8"), "next", "cost"
    )


# ---------------------------------------------------------------- the formula


@pytest.mark.chapter("D43", api="lightning_distill.compression.dynamic_bits")
def test_bits_follow_the_entropy_as_in_the_golden_case(golden):
    case = golden("dynamic_precision")
    probs, low, high = (case.inputs[name] for name in ("probs", "theta_low", "theta_high"))
    assert dynamic_bits(probs, low, high).tolist() == case.expected["bits"].tolist()
    found = torch.special.entr(probs).sum(-1)
    torch.testing.assert_close(found, case.expected["entropy"], rtol=case.rtol, atol=case.atol)
    assert confidence_of_entropy(found[1].item(), 4) == pytest.approx(exit_confidence(probs[1].log(), "entropy").item())


@pytest.mark.chapter("D43")
def test_bits_rise_with_the_entropy_and_stay_within_the_thresholds():
    logits = 4 * torch.randn(200, 7, dtype=torch.float64)
    probs = logits.softmax(-1)
    truth = entropy(probs.numpy(), axis=-1)
    bits = dynamic_bits(probs, 0.4, 1.0, bits=(1, 3, 9))
    assert bits.tolist() == [9 if h > 1.0 else 3 if h > 0.4 else 1 for h in truth]
    ordered = bits[torch.from_numpy(truth).argsort()].tolist()
    assert ordered == sorted(ordered)
    assert dynamic_bits(torch.eye(3, dtype=torch.bfloat16), 0.0, 0.0).tolist() == [2, 2, 2]
    assert dynamic_bits(torch.full((2, 2), 0.5), 0.693, 0.6932).tolist() == [4, 4]


def test_refuses_thresholds_out_of_order_and_what_is_no_probability():
    with pytest.raises(ValueError, match=r"`theta_low` must be from 0 to `theta_high`, got 1.2 and 0.3"):
        dynamic_bits(torch.eye(3), 1.2, 0.3)
    with pytest.raises(ValueError, match=r"`theta_low` must be from 0 to `theta_high`, got nan and 0.3"):
        dynamic_bits(torch.eye(3), math.nan, 0.3)
    for wrong in (3 * torch.eye(3), torch.tensor([[1.5, -0.5]]), torch.tensor([[math.nan, 1.0]])):
        with pytest.raises(ValueError, match="`probs` must be probabilities that sum to 1"):
            dynamic_bits(wrong, 0.1, 0.3)
    with pytest.raises(ValueError, match=r"`entropy` must be in \[0, log\(classes\)\] .*got 3.0 for 4 classes"):
        confidence_of_entropy(3.0, 4)


# ---------------------------------------------------------------- the module


def expected_exits(cascade, x):
    """The definition, sample by sample."""
    taken = []
    for row in x.split(1):
        said = [exit_confidence(logits, cascade.criterion).item() for logits in cascade.all_logits(row)]
        judged = [said[0]] * (len(said) - 1) if cascade.escalate == "direct" else said[:-1]
        passes = [value > limit for value, limit in zip(judged, cascade.thresholds, strict=True)]
        taken.append([*passes, True].index(True))
    return taken


@pytest.mark.chapter("D43", api="lightning_distill.compression.PrecisionCascade")
@pytest.mark.parametrize("escalate", ["next", "direct"])
def test_each_sample_gets_what_the_network_that_answers_says(escalate):
    cascade = plain(thresholds=[0.5, 0.3], escalate=escalate)
    x = torch.randn(100, 6)
    everything = torch.stack(cascade.all_logits(x))
    expected = expected_exits(cascade, x)
    assert set(expected) == {0, 1, 2}
    for member in cascade.networks:
        member.rows.clear()
    logits = cascade(x)
    assert cascade.exits.tolist() == expected
    torch.testing.assert_close(logits, everything[cascade.exits, torch.arange(100)])
    first, second, third = (expected.count(number) for number in range(3))
    paid = [[100], [100 - first], [third]] if escalate == "next" else [[100], [second], [third]]
    assert [member.rows for member in cascade.networks] == paid
    for i in range(6):
        torch.testing.assert_close(cascade(x[i : i + 1]), logits[i : i + 1])
        assert cascade.exits.tolist() == [expected[i]]
    assert cascade(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("escalate", ["next", "direct"])
def test_by_default_the_last_network_alone_is_run(escalate):
    cascade = plain(escalate=escalate)
    x = torch.randn(8, 6)
    assert torch.equal(cascade(x), cascade.networks[2].inner(x))
    assert cascade.exits.tolist() == [2] * 8
    assert [member.rows for member in cascade.networks] == [[], [], [8]]
    cascade.thresholds = [1.0, math.inf]  # is not exceeded, not even by one who is quite sure
    assert torch.equal(cascade(1e4 * x), cascade.networks[2].inner(1e4 * x))
    cascade.thresholds = [-1.0, math.inf]
    for member in cascade.networks:
        member.rows.clear()
    assert torch.equal(cascade(x), cascade.networks[0].inner(x))
    assert [member.rows for member in cascade.networks] == [[8], [], []]


def test_everything_with_one_row_per_sample_is_split():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 5)

        def forward(self, x, *, mask, scale):
            return {"logits": self.layer(x * mask) * scale}  # the scale of each class is no sample's

    cascade = PrecisionCascade([Masked(), Masked()]).eval()
    x, mask, scale = torch.randn(40, 6), (torch.rand(40, 6) > 0.3).float(), torch.rand(5)
    confidences = exit_confidence(cascade.all_logits(x, mask=mask, scale=scale)[0], "entropy")
    cascade.thresholds = [confidences.median().item()]
    logits = cascade(x, mask=mask, scale=scale)
    assert set(cascade.exits.tolist()) == {0, 1}
    everything = torch.stack(cascade.all_logits(x, mask=mask, scale=scale))
    torch.testing.assert_close(logits, everything[cascade.exits, torch.arange(40)])


@pytest.mark.parametrize("escalate", ["next", "direct"])
def test_sequences_take_their_masks_along(escalate):
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 32, "num_labels": 4, "initializer_range": 0.5}
    cascade = PrecisionCascade([from_config("bert", "sequence-classification", settings) for _ in range(2)]).eval()
    cascade.escalate = escalate
    mask = (torch.arange(6) < torch.randint(2, 7, (20, 1))).long()
    batch = {"input_ids": torch.randint(0, 50, (20, 6)), "attention_mask": mask, "labels": torch.randint(0, 4, (20,))}
    report = calibrate_cascade(cascade, [batch], max_drop=1.0, task=SequenceClassification())
    assert report.relative_cost == 1  # the first one alone, which is as large
    everything = cascade.all_logits(input_ids=batch["input_ids"], attention_mask=mask)
    cascade.thresholds = [exit_confidence(everything[0], "entropy").median().item()]
    logits = SequenceClassification().run(cascade, batch).logits
    assert set(cascade.exits.tolist()) == {0, 1}
    torch.testing.assert_close(logits, torch.stack(everything)[cascade.exits, torch.arange(20)])


def test_members_of_one_network_have_their_bits_and_the_operations_of_them():
    network = quantized(4)
    members = members_at_bits(network, (2, 4, 8))
    x = torch.randn(32, 6)
    assert torch.equal(members[1](x), network(x))
    reference = copy.deepcopy(network)
    set_bits(reference, dict.fromkeys(quantized_layers(reference), 2))
    assert torch.equal(members[0](x), reference(x))
    cascade = PrecisionCascade(members)
    assert cascade.bits == (2, 4, 8)
    assert cascade.names == ("2 bits", "4 bits", "8 bits")
    counted = [bit_operations(member, x) for member in members]
    assert counted == [32 * (6 * 16 + 16 * 5) * bits * 8 for bits in (2, 4, 8)]
    assert bit_operations(MLP((6, 16, 5)), x) == 32 * (6 * 16 + 16 * 5) * 32 * 32


def test_a_saved_cascade_is_the_same_again(tmp_path):
    members = members_at_bits(quantized(4))
    cascade = PrecisionCascade(members, [0.1, math.inf], "max_prob", costs=[1, 2, 3]).eval()
    cascade.save(tmp_path / "cascade")
    with pytest.raises(FileExistsError, match="Choose another path, or pass `overwrite=True`"):
        cascade.save(tmp_path / "cascade")
    fresh = [prepare(MLP((6, 16, 5)), QuantSpec(8, activations=8)) for _ in range(3)]
    loaded = PrecisionCascade.load(tmp_path / "cascade", fresh)
    assert loaded.bits == (2, 4, 8)
    assert (loaded.thresholds, loaded.criterion, loaded.costs) == ([0.1, math.inf], "max_prob", (1, 2, 3))
    x = torch.randn(30, 6)
    assert torch.equal(loaded(x), cascade(x))
    with pytest.raises(ValueError, match="are not those of these networks"):
        PrecisionCascade.load(tmp_path / "cascade", [MLP((6, 16, 5)) for _ in range(3)])
    with pytest.raises(FileNotFoundError, match="There is no cascade at"):
        PrecisionCascade.load(tmp_path, fresh)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"networks": 1}, "`networks` must be at least two, cheapest first, got 1"),
        ({"thresholds": [0.5]}, r"one number for each of the 3 networks but the last, got \[0.5\]"),
        ({"thresholds": [0.5, math.nan]}, "one number for each of the 3 networks but the last"),
        ({"thresholds": [0.3, 0.5], "escalate": "direct"}, "`thresholds` must fall where escalate='direct'"),
        ({"escalate": "all"}, "`escalate` must be 'next' or 'direct', got 'all'"),
        ({"criterion": "gate"}, "`criterion` must be one of max_prob, entropy, margin, got 'gate'"),
        ({"costs": [1.0, 2.0]}, "`costs` must be one positive number for each of the 3 networks"),
        ({"costs": [1.0, 2.0, 0.0]}, "`costs` must be one positive number for each of the 3 networks"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    count = arguments.pop("networks", 3)
    with pytest.raises(ValueError, match=message):
        PrecisionCascade([MLP((4, 3)) for _ in range(count)], **arguments)


def test_refuses_shared_layers_and_inputs_without_samples():
    network = MLP((4, 3))
    with pytest.raises(ValueError, match=r"The networks 0 and 2 share the parameter 'head.weight'[\s\S]*deepcopy"):
        PrecisionCascade([network, MLP((4, 3)), network])
    with pytest.raises(TypeError, match="needs a tensor with one row per sample"):
        PrecisionCascade([MLP((4, 3)), MLP((4, 3))])("text")
    with pytest.raises(ValueError, match="`network` has no quantized layer"):
        members_at_bits(network)
    with pytest.raises(ValueError, match=r"`bits` must rise, got \[8, 2\]"):
        members_at_bits(quantized(), [8, 2])


# ---------------------------------------------------------------- calibration


def test_whoever_goes_on_pays_for_the_earlier_passes():
    assert pass_costs([1, 2, 4], [0.5, math.inf], "next") == [1, 1, 5]
    assert pass_costs([1, 2, 4], [math.inf, math.inf], "direct") == [0, 2, 4]
    measured = some_data()
    nobody = measured.report([1.0, 1.0])
    assert nobody.cost == 7
    assert nobody.relative_cost == 7 / 4
    assert nobody.accuracy == nobody.full_accuracy
    assert "cost 175.0% of the last network's" in str(nobody)
    assert measured.report([math.inf, math.inf]).cost == 4
    half = measured.report([0.6, 0.6])
    expected = sum(share * cost for share, cost in zip(half.shares, [1, 3, 7], strict=True))
    assert half.cost == pytest.approx(expected)
    assert half.average_bits == pytest.approx(sum(s * b for s, b in zip(half.shares, (2, 4, 8), strict=True)))
    assert f"{half.average_bits:.2f} bits per weight" in str(half)


def best_of_all(measured, feasible, key):
    """The definition: every pair of thresholds between the samples' confidences."""
    levels = [[-1.0, *column.unique().tolist(), math.inf] for column in measured.confidences.unbind(1)]
    reports = [measured.report(pair) for pair in itertools.product(*levels)]
    return max((report for report in reports if feasible(report)), key=key)


def test_chosen_thresholds_are_about_as_good_as_any():
    measured = some_data(40)
    for drop in (0.0, 0.05, 0.2):
        found = measured.report(measured.choose(max_drop=drop))
        best = best_of_all(
            measured, lambda r, drop=drop: r.accuracy >= r.full_accuracy - drop - 1e-9, lambda r: -r.cost
        )
        assert found.accuracy >= found.full_accuracy - drop - 1e-9
        assert best.cost <= found.cost <= min(1.06 * best.cost, 4.0)
    for limit in (1.0, 2.5, 4.0):
        found = measured.report(measured.choose(max_cost=limit))
        best = best_of_all(measured, lambda r, limit=limit: r.cost <= limit, lambda r: r.accuracy)
        assert found.cost <= limit
        assert best.accuracy - 0.026 <= found.accuracy <= best.accuracy


def test_a_network_that_is_never_right_is_not_run():
    measured = some_data()
    measured.correct[:, 0] = False
    chosen = measured.choose(max_drop=0.0)
    assert chosen[0] == math.inf
    assert measured.report(chosen).cost <= 4
    measured.correct[:, 1] = False
    assert measured.choose(max_drop=0.0) == [math.inf, math.inf]
    measured = some_data()
    measured.correct[:, 0] = False
    found = measured.report(measured.choose(max_cost=2.0))  # all at the second, whose pass then costs 2, and not 3
    assert found.accuracy == measured.alone()["4"].accuracy
    assert found.cost == 2


def test_where_the_first_chooses_its_confidence_alone_is_measured():
    cascade = plain(thresholds=[0.5, 0.3], escalate="direct", costs=[1.0, 2.0, 4.0])
    x, y = torch.randn(200, 6), torch.randint(0, 5, (200,))
    report = evaluate_cascade(cascade, [(x, y)])
    right = cascade(x).argmax(-1) == y
    assert report.accuracy == pytest.approx(right.double().mean().item())
    assert report.shares == pytest.approx([(cascade.exits == number).double().mean().item() for number in range(3)])
    assert min(report.shares) > 0


@pytest.mark.parametrize("escalate", ["next", "direct"])
def test_a_calibrated_cascade_does_what_its_report_says(escalate):
    x = torch.randn(400, 1, 8, 8)
    network = ConvNet2d((4, 6), size=8).eval()
    with torch.no_grad():  # of images of different brightness some are easy
        x += 3 * torch.randn(400, 1, 1, 1)
        network.head.weight.mul_(20)
    y = network(x).argmax(-1)
    y[::10] = -100  # without a label
    members = members_at_bits(prepare(network, QuantSpec(8, activations=8)), (3, 8))
    for member in members:
        calibrate(member, [x])
    loader = DataLoader(TensorDataset(x, y), batch_size=64)
    cascade = PrecisionCascade(members, escalate=escalate).eval()
    report = calibrate_cascade(cascade, loader, max_drop=0.02)
    assert report.accuracy >= report.full_accuracy - 0.02
    assert 0 < report.shares[0] < 1
    assert report == evaluate_cascade(cascade, iter(loader))
    right = cascade(x).argmax(-1) == y
    labelled = y >= 0
    assert report.samples == int(labelled.sum())
    assert report.accuracy == pytest.approx(right[labelled].double().mean().item())
    share = (cascade.exits[labelled] == 1).double().mean().item()
    assert report.relative_cost == pytest.approx(0.375 + share)
    assert report.unit == "bit operations"
    assert measure_cascade(cascade, loader).costs[1] == pytest.approx(bit_operations(members[1], x) / 400)


def test_costs_of_ones_own_count_instead(tmp_path):
    x, y = torch.randn(100, 6), torch.randint(0, 5, (100,))
    cascade = plain(costs=[1.0, 1.0, 1.0])
    measured = measure_cascade(cascade, [(x, y)])
    assert measured.costs == (1, 1, 1)
    assert measured.report([1.0, 1.0]).relative_cost == 3
    alone = measured.alone()
    assert list(alone) == ["0", "1", "2"]
    for number, report in enumerate(alone.values()):
        expected = (cascade.networks[number](x).argmax(-1) == y).double().mean().item()
        assert (report.accuracy, report.relative_cost) == (pytest.approx(expected), 1)
    curve = measured.curve(9)
    assert curve[0].relative_cost == 1
    assert [point.relative_cost for point in curve] == sorted(point.relative_cost for point in curve)
    assert curve[-1].relative_cost == 3
    assert curve[-1].accuracy == alone["2"].accuracy
    path = tmp_path / "curves.png"
    plot_exit_curves({"cascade": curve, "other": curve[:3]}, path, marks=alone)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="`curves` holds no point"):
        plot_exit_curves({"cascade": curve, "other": []}, path)


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "Give exactly one of `max_drop` and `max_cost`"),
        ({"max_drop": 1.5}, r"`max_drop` must be in \[0, 1\], got 1.5"),
        ({"max_cost": 0.0}, "a share of the last network's cost, must be positive, got 0.0"),
        ({"max_cost": 0.1}, "the cheapest network takes 1\\."),
    ],
)
def test_refuses_goals_that_cannot_be_met(goal, message):
    cascade = plain(costs=[1.0, 2.0, 4.0])
    with pytest.raises(ValueError, match=message):
        calibrate_cascade(cascade, [(torch.randn(9, 6), torch.randint(0, 5, (9,)))], **goal)


def test_refuses_data_without_classes():
    with pytest.raises(ValueError, match="hold no labelled sample"):
        measure_cascade(plain(), [(torch.randn(9, 6),)])
    with pytest.raises(ValueError, match="hold no labelled sample"):
        measure_cascade(plain(), [])
    with pytest.raises(TypeError, match="got Regression"):
        measure_cascade(plain(), [(torch.randn(9, 6), torch.randn(9))], task=Regression())
