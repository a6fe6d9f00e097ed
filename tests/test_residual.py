"""Students that add up to their teacher."""

import itertools

import pytest
import torch
from torch import nn

from lightning_distill.residual import ResidualEnsemble, residual_members, residual_targets


@pytest.mark.chapter("C15", api="lightning_distill.residual.residual_targets")
def test_partial_sums_approach_the_teacher(golden):
    case = golden("residual_chain_boosting")
    teacher, capture = case.inputs["f_T"], case.inputs["capture"]
    outputs = [torch.tensor(float(case.inputs["f_S0"]), dtype=torch.float64)]
    sums = [outputs[0].item()]
    for _ in range(int(case.inputs["stages"])):
        outputs.append(capture * residual_targets(torch.tensor(float(teacher), dtype=torch.float64), outputs))
        sums.append(sum(outputs).item())
    assert sums == pytest.approx(case.expected["partial_sums"].tolist(), rel=case.rtol)


@pytest.mark.erratum("ERR-49")
def test_the_printed_chain_oscillates(golden):
    case = golden("residual_chain_as_written")
    teacher, first = float(case.inputs["f_T"]), float(case.inputs["f_S0"])
    outputs = [first]
    for _ in range(int(case.inputs["stages"])):
        outputs.append(teacher - outputs[-1])  # the printed target: only the student before is subtracted
    assert outputs == pytest.approx(case.expected["outputs"].tolist())
    steps = [after - before for before, after in itertools.pairwise(outputs)]
    final = outputs[-1] + sum(steps[:-1])  # the printed sum
    assert final == pytest.approx(outputs[-1] + outputs[-2] - outputs[0]) == float(case.expected["final"])
    assert final != teacher


def test_an_exact_fit_leaves_nothing():
    teacher, first = torch.randn(5, 3), torch.randn(5, 3)
    second = residual_targets(teacher, [first])
    torch.testing.assert_close(first + second, teacher)
    torch.testing.assert_close(residual_targets(teacher, [first, second]), torch.zeros(5, 3))


def test_only_the_last_member_is_trained():
    first, second = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.9)), nn.Linear(4, 3)
    ensemble = ResidualEnsemble([first, second]).train()
    assert not first.training
    assert second.training
    x = torch.randn(5, 4)
    torch.testing.assert_close(ensemble(x), first(x) + second(x))
    ensemble(x).sum().backward()
    assert first[0].weight.grad is None
    assert second.weight.grad is not None
    assert residual_members(ensemble) == [first, second]
    assert residual_members(first) == [first]
    with pytest.raises(ValueError, match="`members` is empty"):
        ResidualEnsemble([])
