"""What a chain of students keeps and loses."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_distill.diagnostics import (
    landscape_smoothness,
    retention_compare,
    stage_degradation,
    stage_information,
)


@pytest.mark.chapter("C08", api="lightning_distill.diagnostics.stage_information")
@pytest.mark.erratum("ERR-47")
def test_stages_lose_together_what_is_lost_directly(golden):
    case = golden("residual_information_telescopes")
    found = stage_information(case.inputs["I"].tolist())
    assert found.stage_losses == pytest.approx(case.expected["stage_losses"].tolist(), rel=case.rtol)
    assert found.total == pytest.approx(float(case.expected["total"]), rel=case.rtol)
    assert found.direct == pytest.approx(float(case.expected["direct"]), rel=case.rtol)
    assert all(loss < found.direct for loss in found.stage_losses)  # which the printed argument takes for a gain


@pytest.mark.chapter("C10", api="lightning_distill.diagnostics.retention_compare")
@pytest.mark.erratum("ERR-48")
def test_a_product_of_retentions(golden):
    case = golden("retention_product")
    found = retention_compare(case.inputs["stage_retention"].tolist(), float(case.inputs["direct"]))
    assert found.progressive == pytest.approx(float(case.expected["progressive"]), rel=case.rtol)
    assert found.holds is case.expected["holds"]
    needed = float(case.expected["equal_per_stage_needed"])
    assert found.equal_per_stage_needed == pytest.approx(needed, rel=case.rtol)
    assert not retention_compare([needed - 1e-6] * 3, float(case.inputs["direct"])).holds
    assert found.progressive <= min(found.stages)


@pytest.mark.chapter("C21", api="lightning_distill.diagnostics.stage_degradation")
@pytest.mark.erratum("ERR-50")
def test_drops_bound_the_whole_and_nothing_else():
    falling = stage_degradation([0.9, 0.85, 0.7])
    assert falling.total == pytest.approx(falling.bound) == pytest.approx(0.2)
    mixed = stage_degradation([0.9, 0.6, 0.8])
    assert mixed.drops == pytest.approx([0.3, -0.2])
    assert mixed.total == pytest.approx(0.1)
    assert mixed.bound == pytest.approx(0.5)
    there_and_back = stage_degradation([0.9, 0.1, 0.9])  # bounded drops say nothing about where a chain goes
    assert there_and_back.total == pytest.approx(0)
    assert there_and_back.bound == pytest.approx(1.6)


@pytest.mark.chapter("C09", api="lightning_distill.diagnostics.landscape_smoothness")
def test_a_convex_loss_has_no_barrier_and_its_largest_eigenvalue_bounds_the_gradient():
    matrix = torch.diag(torch.tensor([5.0, 2.0, 1.0]))
    network = nn.Linear(3, 1, bias=False)

    def loss(net):
        w = net.weight.flatten()
        return 0.5 * w @ matrix @ w

    start = network.weight.detach().clone()
    found = landscape_smoothness(network, loss, {"weight": torch.full((1, 3), 2.0)}, probes=200)
    assert found.barrier == pytest.approx(0, abs=1e-5)
    assert found.smoothness <= 5 + 1e-2
    assert found.smoothness > 4
    assert len(found.losses) == 21
    assert torch.equal(network.weight, start)
    bumpy = landscape_smoothness(
        network, lambda net: (math.pi * net.weight.sum()).sin(), {"weight": start + 1 / 3}, points=101
    )
    expected = [math.sin(math.pi * (float(start.sum()) + share)) for share in torch.linspace(0, 1, 101).tolist()]
    assert bumpy.losses == pytest.approx(expected, abs=1e-4)
    line = torch.linspace(expected[0], expected[-1], 101).tolist()
    assert bumpy.barrier == pytest.approx(max(a - b for a, b in zip(expected, line, strict=True)), abs=1e-3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: stage_information([1.0]), "`information` must be two finite numbers or more"),
        (lambda: stage_degradation([0.5, float("nan")]), "`accuracies` must be two finite numbers or more"),
        (lambda: retention_compare([], 0.9), "must be positive, of one stage at least"),
        (lambda: retention_compare([0.9], 0.0), "must be positive"),
        (lambda: landscape_smoothness(nn.Linear(1, 1), len, {}, points=1), "`points` must be at least 2"),
        (lambda: landscape_smoothness(nn.Linear(1, 1), len, {}), "`end` must hold all weights.*'weight' is missing"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_network_is_left_alone_when_the_loss_fails():
    network = nn.Linear(2, 1)
    before = copy.deepcopy(network.state_dict())

    def loss(net):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        landscape_smoothness(network, loss, {"weight": torch.ones(1, 2), "bias": torch.ones(1)})
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
