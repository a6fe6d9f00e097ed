"""Rounded weights, sensitivities and whole searches on a small trained network."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from lightning_distill.bit_search import (
    BitSearchResult,
    PlanLoss,
    RoundedWeights,
    channel_fisher_errors,
    divergence,
    effective_bits,
    fisher_errors,
    pareto_front,
    round_weight,
    search_bits,
)
from lightning_distill.networks import MLP
from lightning_distill.tasks import CausalLM, Classification, Regression

API = "lightning_distill.bit_search."


def trained():
    """A network that has learnt something, and unlabelled batches."""
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    y = (x[:, :3] * torch.tensor([1.0, -2.0, 0.5])).argmax(dim=1)
    network = MLP((6, 12, 8, 3))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return network, [(x[:100],), (x[100:],)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounded_weights_lie_on_a_grid_and_no_step_of_it_is_better(bits):
    weight = torch.randn(5, 40) * torch.tensor([1.0, 0.01, 3.0, 100.0, 0.0])[:, None]
    rounded = round_weight(weight, bits)
    levels = 2 ** (bits - 1) - 1
    for row, own in zip(rounded, weight, strict=True):
        values = row.unique()
        assert len(values) <= 2 * levels + 1
        if own.abs().max() == 0:
            assert row.abs().max() == 0
            continue
        error = (row - own).square().sum()
        for share in torch.linspace(0.2, 1.0, 40):
            step = own.abs().max() * share / levels
            other = (own / step).round().clamp(-levels, levels) * step
            assert error <= (other - own).square().sum() * (1 + 1e-5)
    assert round_weight(weight.reshape(5, 4, 10), bits).equal(rounded.reshape(5, 4, 10))
    assert round_weight(weight.bfloat16(), bits).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="`bits` must be from 2 to 16, got 1"):
        round_weight(weight, 1)


def test_weights_are_put_in_for_a_while_and_come_back_bit_for_bit():
    network, batches = trained()
    before = copy.deepcopy(network.state_dict())
    addresses = [parameter.data_ptr() for parameter in network.parameters()]
    rounded = RoundedWeights(network, (2, 8))
    assert rounded.sizes == {"blocks.0.0": 72, "blocks.1.0": 96, "head": 24}
    with rounded.applied({"head": 2}):
        assert torch.equal(network.head.weight, round_weight(before["head.weight"], 2))
        assert torch.equal(network.blocks[0][0].weight, before["blocks.0.0.weight"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), rounded.applied({"head": 2}):
        network(torch.zeros(1, 5))
    loss = PlanLoss(network, rounded, batches, Classification())
    loss(dict.fromkeys(rounded.sizes, 2))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [parameter.data_ptr() for parameter in network.parameters()] == addresses
    assert network.training


def test_layers_that_are_not_there_or_share_a_weight_are_refused():
    network, _ = trained()
    with pytest.raises(ValueError, match=r"names 'heat', which is no .* layer of MLP. Nearest names: \['head'"):
        RoundedWeights(network, (2, 8), ["heat"])
    with pytest.raises(ValueError, match="Flatten has no linear, convolution or embedding layer"):
        RoundedWeights(nn.Flatten(), (2, 8))
    with pytest.raises(ValueError, match=r"two or more whole numbers from 1 to 32 to choose from, got \[4\]"):
        RoundedWeights(network, [4])
    tied = nn.ModuleDict({"embed": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)})
    tied["head"].weight = tied["embed"].weight
    with pytest.raises(ValueError, match="'embed' and 'head' share one weight and need the same bits"):
        RoundedWeights(tied, (2, 8))
    assert RoundedWeights(tied, (2, 8), ["head"]).sizes == {"head": 28}


def test_the_loss_of_a_plan_is_the_divergence_of_the_outputs():
    network, batches = trained()
    rounded = RoundedWeights(network, (2, 4, 16))
    loss = PlanLoss(network, rounded, batches, Classification())
    plan = {"blocks.0.0": 4, "blocks.1.0": 2, "head": 16}
    other = copy.deepcopy(network)
    with torch.no_grad():
        for name, bits in plan.items():
            layer = other.get_submodule(name)
            layer.weight.copy_(round_weight(layer.weight, bits))
        x = torch.cat([batch[0] for batch in batches])
        expected = nn.functional.kl_div(
            other(x).log_softmax(1), network(x).log_softmax(1), reduction="batchmean", log_target=True
        )
    assert loss(plan) == pytest.approx(expected.item(), rel=1e-4)
    assert loss(dict.fromkeys(rounded.sizes, 16)) < 1e-6
    own, said = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(divergence(own, said, probabilities=False), (own - said).square().sum(dim=1))
    squared = PlanLoss(network, rounded, batches, Regression())
    with torch.no_grad():
        assert squared(plan) == pytest.approx((other(x) - network(x)).square().sum(dim=1).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="`batches` is empty"):
        PlanLoss(network, rounded, [], Classification())


def test_fisher_is_the_second_order_estimate_of_the_divergence():
    network, batches = trained()
    # far from certain, so that 2nd order is a good model and labels vary
    with torch.no_grad():
        network.head.weight.mul_(0.2)
        network.head.bias.mul_(0.2)
    rounded = RoundedWeights(network, (6, 8), ["head"])
    found = fisher_errors(network, rounded, batches, Classification(), samples=256)
    x = torch.cat([batch[0] for batch in batches])
    hidden = network.blocks(x).detach()
    p = network(x).softmax(dim=1).detach()
    change = hidden @ (round_weight(network.head.weight, 6) - network.head.weight.detach()).T  # of the logits
    # E over labels of (g . dw) ** 2 of each channel, exactly: the variance of its logit's change under p
    exact = 0.5 * (p * (1 - p) * change.square()).mean(dim=0)
    settings = (network, rounded, batches, Classification())
    drawn = [fisher_errors(*settings, samples=256, seed=s)["head"][6] for s in range(12)]
    assert sum(drawn) / 12 == pytest.approx(exact.sum().item(), rel=0.25)
    channels = [channel_fisher_errors(*settings, samples=256, seed=s)["head"][:, 0] for s in range(12)]
    torch.testing.assert_close(sum(channels) / 12, exact, rtol=0.4, atol=0)  # a standard error is about 11 %
    assert drawn == pytest.approx([own.sum().item() for own in channels])
    fine = RoundedWeights(network, (6, 16), ["head"])
    loss = PlanLoss(network, fine, batches, Classification())
    measured = [loss({"head": tuple(6 if own == channel else 16 for own in range(3))}) for channel in range(3)]
    assert exact.tolist() == pytest.approx(measured, rel=0.05)
    assert len(set(drawn)) == 12
    assert found["head"][8] < found["head"][6]
    assert found == fisher_errors(network, rounded, batches, Classification(), samples=256)
    assert all(parameter.grad is None for parameter in network.parameters())
    network.requires_grad_(False)
    assert fisher_errors(network, rounded, batches, Classification(), samples=8)["head"][6] > 0
    assert not any(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(ValueError, match="`samples` must be positive, got 0"):
        fisher_errors(network, rounded, batches, Classification(), samples=0)
    with pytest.raises(ValueError, match="needs a task with probabilities, got Regression"):
        fisher_errors(network, rounded, batches, Regression())


@pytest.mark.chapter("D18", api=API + "search_bits")
@pytest.mark.parametrize("sensitivity", ["kl", "fisher", "weights"])
@pytest.mark.parametrize("refinement", ["none", "neighbours", "greedy", "nsga2"])
def test_a_search_is_within_its_budget_and_not_worse_than_the_same_bits_everywhere(sensitivity, refinement):
    if refinement == "nsga2":
        pytest.importorskip("optuna")
    network, batches = trained()
    settings = {"sensitivity": sensitivity, "refinement": refinement, "evaluations": 10}
    found = search_bits(network, batches, effective_bits=4.0, bits=(2, 3, 4, 8), **settings)
    assert found.effective_bits <= 4.0
    assert effective_bits(found.plan, found.sizes) == found.effective_bits
    losses = {tuple(trial.plan.values()): trial.loss for trial in found.trials}
    assert found.loss <= losses[4, 4, 4]
    assert found.loss == losses[tuple(found.plan.values())]
    assert found.bytes == math.ceil(sum(found.sizes[name] * bits for name, bits in found.plan.items()) / 8)
    again = search_bits(network, batches, effective_bits=4.0, bits=(2, 3, 4, 8), **settings)
    assert again == found


def test_refined_plans_are_the_best_of_all():
    network, batches = trained()
    found = search_bits(network, batches, max_bytes=90, bits=(2, 4, 8), refinement="neighbours")
    rounded = RoundedWeights(network, (2, 4, 8))
    loss = PlanLoss(network, rounded, batches, Classification())
    plans = [dict(zip(rounded.sizes, (a, b, c), strict=True)) for a in (2, 4, 8) for b in (2, 4, 8) for c in (2, 4, 8)]
    within = [plan for plan in plans if sum(rounded.sizes[name] * bits for name, bits in plan.items()) <= 720]
    assert found.loss == pytest.approx(min(map(loss, within)), rel=1e-6)
    assert found.bytes <= 90
    assert found.budget == pytest.approx(720 / 192)


def test_results_print_plot_and_survive_json(tmp_path):
    network, batches = trained()
    found = search_bits(network, batches, effective_bits=4, bits=(2, 4, 8))
    lines = str(found).splitlines()
    assert len(lines) == 5
    assert lines[1].split()[:3] == ["blocks.0.0", "72", str(found.plan["blocks.0.0"])]
    assert f"{found.effective_bits:.3f} bits per weight (budget 4)" in lines[-1]
    found.write(tmp_path / "plan")
    assert (tmp_path / "plan" / "bits.png").stat().st_size > 10_000
    assert BitSearchResult.from_dict(json.loads((tmp_path / "plan" / "bits.json").read_text())) == found
    front = found.front()
    assert pareto_front([(trial.loss, trial.cost) for trial in front]) == list(range(len(front)))


def test_a_language_model_is_searched_on_the_tokens_that_count():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    ids = torch.randint(11, (4, 6))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    found = search_bits(network, batches, effective_bits=5, task=CausalLM(), bits=(2, 4, 8))
    with torch.no_grad():
        other = copy.deepcopy(network)
        for name, bits in found.plan.items():
            other.get_submodule(name).weight.copy_(round_weight(other.get_submodule(name).weight, bits))
        rows = [(i, t) for i in range(4) for t in range(5) if mask[i, t + 1]]
        own, said = (torch.stack([net(ids)[i, t] for i, t in rows]) for net in (network, other))
    assert found.loss == pytest.approx(divergence(own, said).mean().item(), rel=1e-4)


def test_bad_settings_are_refused():
    network, batches = trained()
    cases = {
        "Give exactly one budget": {},
        "`effective_bits` is 1.5, which is below the fewest bits, 2": {"effective_bits": 1.5},
        "`effective_bits` is 40, which is above float32": {"effective_bits": 40},
        "`max_bytes` is 10, but the cheapest plan needs 48": {"max_bytes": 10},
        "`max_bytes` must be positive and finite, got 0": {"max_bytes": 0},
        "`sensitivity` must be 'kl', 'fisher' or 'weights', got 'hessian'": {
            "effective_bits": 4,
            "sensitivity": "hessian",
        },
        "`refinement` must be one of": {"effective_bits": 4, "refinement": "more"},
        "`points` must be 0 or at least 2, got 1": {"effective_bits": 4, "points": 1},
        "which is no linear, convolution or embedding layer": {"effective_bits": 4, "layers": ["body"]},
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            search_bits(network, batches, **settings)
