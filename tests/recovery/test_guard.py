"""Recovery steps are alternatives; ensembles and refinement against their closed forms."""

import math

import pytest
import torch
from torch import nn

from lightning_distill.diagnostics import ban_operator
from lightning_distill.recovery import bootstrap_refine, recover
from lightning_distill.teachers.past import mean_prediction

API = "lightning_distill.recovery."


def shift(by):
    def step(network):
        with torch.no_grad():
            network.bias += by

    return step


def bias(network):
    return network.bias.item()


@pytest.mark.chapter("D28", api=API + "recover")
def test_each_step_starts_from_the_same_network_and_the_best_is_kept():
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.bias)
    best, report = recover(network, {"one": shift(1.0), "two": shift(2.0), "down": shift(-1.0)}, bias)
    assert report.scores == {"one": 1.0, "two": 2.0, "down": -1.0}
    assert report.before == 0.0
    assert report.kept == "two"
    assert bias(best) == 2.0
    assert bias(network) == 0.0
    best, report = recover(network, {"one": shift(1.0), "down": shift(-1.0)}, bias, mode="min")
    assert (report.kept, bias(best)) == ("down", -1.0)
    assert str(report).splitlines() == ["before      0.0000", "one         1.0000", "down       -1.0000  kept"]


def test_nothing_is_kept_that_is_no_better_and_a_step_may_return_a_network():
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.bias)
    best, report = recover(network, {"same": shift(0.0), "worse": shift(-1.0)}, bias)
    assert best is network
    assert report.kept is None
    other = nn.Linear(1, 1)
    nn.init.ones_(other.bias)
    best, report = recover(network, {"other": lambda _: other}, bias)
    assert best is other
    assert report.kept == "other"
    best, report = recover(network, {"nan": shift(math.nan), "one": shift(1.0)}, bias)
    assert report.kept == "one"
    with pytest.raises(ValueError, match="holds no recovery step"):
        recover(network, {}, bias)
    with pytest.raises(ValueError, match="`mode` must be 'max' or 'min', got 'best'"):
        recover(network, {"one": shift(1.0)}, bias, mode="best")


@pytest.mark.chapter("D30", api=API + "bootstrap_refine")
def test_refinement_keeps_the_best_round():
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.bias)
    moves = iter([3.0, -2.0, 1.5])
    seen = []

    def refine(student, teacher):
        seen.append(bias(teacher))
        shift(next(moves))(student)

    best, scores = bootstrap_refine(network, refine, bias, rounds=3)
    assert scores == [0.0, 3.0, 1.0, 2.5]
    assert seen == [0.0, 3.0, 1.0]
    assert bias(best) == 3.0
    assert bias(network) == 0.0
    same, scores = bootstrap_refine(network, lambda s, t: shift(1.0)(s), bias, mode="min")
    assert same is network
    assert scores == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        bootstrap_refine(network, refine, bias, rounds=0)


@pytest.mark.chapter("D30")
def test_without_rounding_refinement_is_the_born_again_iteration(golden):
    case = golden("bootstrap_refinement_sequence")
    label, p = case.inputs["label"], case.inputs["p0"]
    found = [p]
    for _ in range(int(case.inputs["rounds"])):
        p = ban_operator(p, label, case.inputs["lam"])
        found.append(p)
    torch.testing.assert_close(torch.stack(found), case.expected["p"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("D31")
def test_an_ensemble_is_the_mean_of_probabilities_and_no_worse_than_its_mean_member(golden):
    case = golden("quant_ensemble")
    probabilities = case.inputs["probs"]
    members = probabilities.log()
    mean = mean_prediction(members, torch.full((len(members),), 1 / len(members), dtype=torch.float64)).exp()
    torch.testing.assert_close(mean, case.expected["p"], rtol=1e-6, atol=1e-8)
    losses = sorted(-member.log() for member in probabilities[:, 0].double())
    assert min(losses) <= -mean[0].log() <= sum(losses) / len(losses)
