"""Networks that stop computing early: what they compute, what they give, what they refuse."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from lightning_distill.compression import EarlyExitNetwork, calibrate_exits, evaluate_exits, measure_exits
from lightning_distill.losses import AuxiliaryHeads
from lightning_distill.networks import MLP, ConvNet2d, from_config
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import CausalLM, SequenceClassification

TAPS = ["blocks.0", "blocks.1"]


class Counting(nn.Module):
    """Counts its calls and the rows that it gets."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return self.inner(x)


def built(network, taps, features, classes=10, **arguments):
    heads = AuxiliaryHeads(taps, "linear", **arguments)
    items = len(next(iter(features.values())))
    heads.build_for(Step(None, Outputs(torch.zeros(items, classes), features=features)))
    return heads


def mlp(**arguments):
    network = MLP((6, 16, 16, 16, 10)).eval()
    heads = built(network, TAPS, {name: torch.zeros(2, 16) for name in TAPS})
    for head in heads.heads:  # sure of some samples and not of others
        nn.init.normal_(head[0].weight, std=3.0)
    return EarlyExitNetwork(network, heads, **arguments).eval()


def conv(**arguments):
    network = ConvNet2d((4, 6, 8)).eval()
    heads = built(network, TAPS, {"blocks.0": torch.zeros(2, 4, 8, 8), "blocks.1": torch.zeros(2, 6, 4, 4)})
    for head in heads.heads:
        nn.init.normal_(head[0].weight, std=5.0)
    return EarlyExitNetwork(network, heads, **arguments).eval()


def bert():
    torch.manual_seed(0)
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    network = from_config("bert", "sequence-classification", settings | {"intermediate_size": 32, "num_labels": 4})
    taps = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    heads = built(network, taps, {name: torch.zeros(2, 16) for name in taps}, classes=4)
    for head in heads.heads:
        nn.init.normal_(head[0].weight, std=1.0)
    return EarlyExitNetwork(network.eval(), heads).eval()


def tokens(samples=8):
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.randint(2, 7, (samples, 1), generator=generator)).long()
    return {"input_ids": torch.randint(0, 50, (samples, 6), generator=generator), "attention_mask": mask}


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


INPUTS = {"mlp": (mlp, noise(64, 6)), "conv": (conv, noise(64, 1, 8, 8))}


def medians(network, *args, **kwargs):
    """Thresholds that half of the samples pass."""
    said = network.all_logits(*args, **kwargs)[:-1]
    return [logits.softmax(-1).amax(-1).quantile(0.5).item() for logits in said]


@pytest.mark.chapter("D44", api="lightning_distill.compression.EarlyExitNetwork")
@pytest.mark.parametrize("kind", INPUTS)
def test_each_sample_gets_the_logits_of_its_exit_however_the_batch_is_run(kind):
    make, x = INPUTS[kind]
    network = make()
    network.thresholds = medians(network, x)
    everything = torch.stack(network.all_logits(x))
    confidences = everything[:-1].softmax(-1).amax(-1)
    passes = [[*row, True] for row in (torch.tensor(network.thresholds) < confidences.T).tolist()]
    expected = torch.tensor([row.index(True) for row in passes])
    assert set(expected.tolist()) == {0, 1, 2}
    logits = network(x)
    assert torch.equal(network.exits, expected)
    torch.testing.assert_close(logits, everything[expected, torch.arange(64)])
    assert network.can_split(x)
    network.sub_batches = True
    torch.testing.assert_close(network(x), logits)
    assert torch.equal(network.exits, expected)
    for i in range(8):
        torch.testing.assert_close(network(x[i : i + 1]), logits[i : i + 1])
        assert network.exits.tolist() == [expected[i]]


@pytest.mark.chapter("D44")
def test_layers_after_the_exit_are_not_run():
    network = mlp()
    later = [Counting(network.network.blocks[i]) for i in (1, 2)]
    network.network.blocks[2] = later[1]
    x = torch.randn(16, 6)
    network.thresholds = [-1.0, math.inf]
    network(x)
    assert later[1].rows == []
    with FlopCounterMode(display=False) as counter:
        network(x[:1])
    assert counter.get_total_flops() == 2 * (6 * 16 + 16 * 10)  # the first layer and its head
    network.thresholds = [math.inf, math.inf]
    network(x)
    assert later[1].rows == [16]
    network.thresholds = medians(network, x)
    later[1].rows.clear()
    network(x)
    assert later[1].rows == [16]  # until the last sample may leave
    network.sub_batches = True
    network(x)
    assert later[1].rows == [16, int((network.exits == 2).sum())]
    assert not network.network.blocks[0]._forward_hooks


def test_thresholds_that_are_never_passed_give_the_network_itself():
    network = conv()
    x = torch.randn(5, 1, 8, 8)
    assert network.thresholds == [math.inf, math.inf]
    assert torch.equal(network(x), network.network(x))
    network.thresholds = [1.0, 1.0]
    assert torch.equal(network(x), network.network(x))
    assert network.exits.tolist() == [2] * 5


def test_transformers_leave_early_and_padding_does_not_matter():
    network = bert()
    batch = tokens()
    network.thresholds = medians(network, **batch)
    logits, exits = network(**batch), network.exits
    assert len(set(exits.tolist())) > 1
    for i in range(len(exits)):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        torch.testing.assert_close(network(**one), logits[i : i + 1], rtol=1e-4, atol=1e-5)
        assert network.exits.item() == exits[i]
        short = {key: value[:, : int(one["attention_mask"].sum())] for key, value in one.items()}
        torch.testing.assert_close(network(**short), logits[i : i + 1], rtol=1e-4, atol=1e-5)


def test_masks_around_the_taps_are_found_out():
    """BERT hands each layer the whole batch's mask: with a part of the samples it fails, or is wrong."""
    network = bert()
    assert not network.can_split(**tokens())
    assert not network.sub_batches

    class Shortcut(MLP):
        def forward(self, x):
            first = self.blocks[0](x)
            return self.head(self.blocks[2](self.blocks[1](first) + first.mean()))

    around = Shortcut((6, 16, 16, 16, 10)).eval()
    assert not EarlyExitNetwork(around, mlp().heads).can_split(torch.randn(8, 6))


def test_an_input_may_be_an_exit():
    plain = mlp()
    heads = built(plain.network, ["blocks.1@input"], {"blocks.1@input": torch.zeros(2, 16)})
    at_input = EarlyExitNetwork(plain.network, heads, [-1.0])
    x = torch.randn(4, 6)
    torch.testing.assert_close(at_input(x), heads.heads[0](plain.network.blocks[0](x)))
    at_input.thresholds, at_input.sub_batches = medians(at_input, x), True
    torch.testing.assert_close(at_input(x)[at_input.exits == 1], plain.network(x)[at_input.exits == 1])


class ByKeyword(MLP):
    """Hands features on by keyword, as transformers models do, and in a tuple."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, hidden_states):
            return self.inner(hidden_states), "more"

    def __init__(self):
        super().__init__((6, 16, 10))
        self.layers = nn.ModuleList([self.Layer(), self.Layer()])

    def forward(self, x):
        x = self.blocks(x)
        for layer in self.layers:
            x, _ = layer(hidden_states=x)
        return self.head(x)


@pytest.mark.parametrize("tap", ["layers.1@input", "layers.0"])
def test_features_may_be_handed_on_by_keyword_and_in_tuples(tap):
    plain, x = ByKeyword(), noise(32, 6)
    heads = built(plain, [tap], {tap: torch.zeros(2, 16)})
    network = EarlyExitNetwork(plain, heads)
    network.thresholds = medians(network, x)
    whole = network(x)
    assert network.can_split(x)
    network.sub_batches = True
    torch.testing.assert_close(network(x), whole)
    assert set(network.exits.tolist()) == {0, 1}

    class Listed(MLP):
        def forward(self, x):
            return self.head(self.wrap(self.blocks(x))["x"])

    odd = Listed((6, 16, 10))
    odd.wrap = Dicts()
    with pytest.raises(TypeError, match=r"An exit needs a layer that gives a tensor, .* got \{'x'"):
        EarlyExitNetwork(odd, built(odd, ["wrap"], {"wrap": torch.zeros(2, 16)}))(x)


class Dicts(nn.Module):
    def forward(self, x):
        return {"x": x}


@pytest.mark.parametrize("make", [mlp, conv])
def test_what_is_saved_is_loaded(make, tmp_path):
    network = make(thresholds=[0.9, math.inf], criterion="margin", sub_batches=True)
    x = INPUTS[make.__name__][1]
    network.save(tmp_path / "exits")
    fresh = MLP((6, 16, 16, 16, 10)) if make is mlp else ConvNet2d((4, 6, 8))
    loaded = EarlyExitNetwork.load(tmp_path / "exits", fresh)
    assert torch.equal(loaded(x), network(x))
    assert torch.equal(loaded.exits, network.exits)
    assert (loaded.thresholds, loaded.criterion, loaded.sub_batches) == ([0.9, math.inf], "margin", True)
    assert not loaded.training
    assert {path.name for path in (tmp_path / "exits").iterdir()} == {"model.safetensors", "exits.json"}
    with pytest.raises(FileExistsError, match=r"exits' exists\. Choose another path, or pass `overwrite=True`"):
        network.save(tmp_path / "exits")
    network.thresholds = [0.5, 0.5]
    network.save(tmp_path / "exits", overwrite=True)
    assert EarlyExitNetwork.load(tmp_path / "exits", fresh).thresholds == [0.5, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["exits"]


def test_shared_heads_are_saved_once_and_loaded(tmp_path):
    network = mlp()
    heads = AuxiliaryHeads(TAPS, "shared", hidden=4)
    features = {name: torch.zeros(2, 16) for name in TAPS}
    heads.build_for(Step(None, Outputs(torch.zeros(2, 10), features=features)))
    shared = EarlyExitNetwork(network.network, heads, [0.2, 0.2])
    shared.save(tmp_path / "shared")
    loaded = EarlyExitNetwork.load(tmp_path / "shared", MLP((6, 16, 16, 16, 10)))
    assert loaded.heads.heads[0].shared is loaded.heads.heads[1].shared
    x = torch.randn(8, 6)
    assert torch.equal(loaded(x), shared.eval()(x))


def test_copies_do_not_share_anything():
    network = mlp(thresholds=[-1.0, -1.0])
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.network.blocks[0][0].weight.zero_()
    x = torch.randn(3, 6)
    assert not torch.equal(twin(x), network(x))
    assert network.exits.tolist() == [0, 0, 0]


@pytest.mark.chapter("D44", api="lightning_distill.compression.calibrate_exits")
def test_calibration_meets_its_goal_and_its_report_is_what_a_run_gives():
    """The first head always says 9 and is wrong, the second is right where it is sure, the network mostly."""
    network, x = mlp(), torch.randn(300, 6)
    nn.init.zeros_(network.heads.heads[0][0].weight)
    with torch.no_grad():
        network.heads.heads[0][0].bias.copy_(torch.eye(10)[9])
        _, second, whole = network.all_logits(x)
        sure = second.softmax(-1).amax(-1)
        labels = torch.where(sure > sure.median(), second.argmax(-1), whole.argmax(-1))
    labels[:20] = -100
    keep = labels.where(labels != 9, -100)
    loader = DataLoader(TensorDataset(x, keep), batch_size=64)
    with pytest.warns(UserWarning, match=r"No sample leaves at 'blocks.0' \(threshold inf\). Their heads cost"):
        report = calibrate_exits(network, loader, max_drop=0.0)
    assert report.accuracy >= report.full_accuracy
    assert report.shares[1] >= 0.4
    assert network.thresholds == list(report.thresholds)
    assert network.sub_batches
    assert "of a batch, later layers get the samples that are left" in str(report)
    counted = keep != -100
    assert report.samples == counted.sum() < 290
    predicted = network(x[counted]).argmax(-1)
    assert (predicted == keep[counted]).double().mean().item() == pytest.approx(report.accuracy)
    shares = torch.bincount(network.exits, minlength=3).double() / report.samples
    assert shares.tolist() == pytest.approx(report.shares)
    with pytest.warns(UserWarning, match="No sample leaves"):
        assert str(evaluate_exits(network, loader)) == str(report)


def test_operations_are_counted_by_hand():
    network, x = mlp(), torch.randn(10, 6)
    measured = measure_exits(network, [(x, torch.zeros(10).long())])
    first, middle, head = 2 * 6 * 16, 2 * 16 * 16, 2 * 16 * 10
    assert measured.costs == (first + head, first + middle + 2 * head, first + 2 * middle + 3 * head)
    assert measured.full_cost == first + 2 * middle + head
    curve = measured.curve(5)
    assert curve[0].cost == measured.costs[0]
    assert curve[-1].relative_cost == pytest.approx(measured.costs[-1] / measured.full_cost)
    assert curve[-1].relative_cost > 1  # the heads are paid for and not used


def test_calibration_reads_sequences_and_leaves_unlabelled_samples_out():
    network = bert()
    batch = tokens() | {"labels": torch.tensor([0, 1, 2, 3, 0, 1, -100, -100])}
    report = calibrate_exits(network, [batch], max_cost=0.9, task=SequenceClassification())
    assert report.samples == 6
    assert report.relative_cost <= 0.9
    assert not network.sub_batches
    assert "a batch stops when its last sample may: later layers cannot do with a part of it" in str(report)


def test_thresholds_out_of_reach_are_reported():
    network = mlp(thresholds=[1.0, -1.0])
    with pytest.warns(UserWarning, match=r"No sample leaves at 'blocks.0' \(threshold 1\). Lower their thresholds"):
        report = evaluate_exits(network, [(torch.randn(20, 6), torch.zeros(20).long())])
    assert report.never_taken == ("blocks.0",)


def test_taps_out_of_order_are_refused():
    network = mlp()
    heads = built(network.network, TAPS[::-1], {name: torch.zeros(2, 16) for name in TAPS[::-1]})
    wrong = EarlyExitNetwork(network.network, heads)
    with pytest.raises(
        ValueError, match=r"runs \['blocks.0', 'blocks.1'\], the heads sit on \['blocks.1', 'blocks.0'\]"
    ):
        measure_exits(wrong, [(torch.randn(4, 6), torch.zeros(4).long())])


class Unused(MLP):
    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mlp(thresholds=[0.5]), r"one number for each of the 2 heads, got \[0.5\]"),
        (lambda: mlp(thresholds=[0.5, math.nan]), "one number for each of the 2 heads"),
        (lambda: mlp(criterion="gate"), "`criterion` must be one of max_prob, entropy, margin, got 'gate'"),
        (lambda: EarlyExitNetwork(MLP((6, 10)), AuxiliaryHeads(["head"])), "`heads` were never built"),
        (
            lambda: EarlyExitNetwork(
                MLP((6, 16, 10)), built(None, ["hidden_states.1"], {"hidden_states.1": torch.zeros(2, 16)})
            ),
            "An exit must sit on a submodule.*'bert.encoder.layer.2'",
        ),
        (lambda: calibrate_exits(mlp(), [], max_drop=0.1), "`batches` hold no labelled sample"),
        (lambda: calibrate_exits(mlp(), [(torch.zeros(2, 6),)], max_drop=0.1), "`batches` hold no labelled sample"),
        (lambda: calibrate_exits(mlp(), [], max_cost=0.0), "`max_cost`, a share .* must be positive, got 0.0"),
        (
            lambda: calibrate_exits(mlp(), [(torch.zeros(2, 6), torch.zeros(2).long())], max_cost=0.01),
            "leaving at the cheapest exit takes 512",
        ),
        (
            lambda: EarlyExitNetwork(Unused((10, 10, 10, 10)), mlp().heads)(torch.zeros(1, 10)),
            "ran none of the tapped layers",
        ),
    ],
)
def test_refuses_what_cannot_work(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_refuses_token_tasks_and_missing_or_foreign_files(tmp_path):
    with pytest.raises(TypeError, match=r"need one class per sample, .* got CausalLM"):
        measure_exits(mlp(), [], task=CausalLM())
    with pytest.raises(FileNotFoundError, match="no network with exits at"):
        EarlyExitNetwork.load(tmp_path, MLP((6, 10)))
    mlp().save(tmp_path / "exits")
    with pytest.raises(ValueError, match=r"are not those of this MLP: \['network.blocks.2.0.bias'"):
        EarlyExitNetwork.load(tmp_path / "exits", MLP((6, 16, 16, 10)))
