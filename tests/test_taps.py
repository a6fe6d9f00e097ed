"""Taps: activations by name, without a trace when they are gone."""

import pytest
import torch
from torch import nn

from lightning_distill import KD
from lightning_distill.losses import Term, teacher_outputs
from lightning_distill.taps import Taps


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


class Hint(Term):
    """Squared distance of two hidden layers."""

    student_taps = ("1",)
    teacher_taps = ("1",)

    def forward(self, step):
        difference = step.student.features["1"] - teacher_outputs(step).features["1"]
        return difference.square().mean(dim=-1)


def test_keep_what_the_submodules_return():
    net, x = network(), torch.randn(5, 4)
    taps = Taps(net, ["0", "1", "0"])
    net(x)
    kept = taps.take()
    assert list(kept) == ["0", "1"]
    torch.testing.assert_close(kept["1"], net[1](net[0](x)))
    assert taps.take()["0"].shape == (5, 8)  # of the calls above
    assert taps.take() == {}


def test_leave_no_hook_behind():
    net = network()
    taps = Taps(net, ["0"])
    assert net[0]._forward_hooks
    taps.remove()
    net(torch.randn(1, 4))
    assert taps.take() == {}
    assert not any(module._forward_hooks for module in net.modules())
    Taps(net, [])
    assert not any(module._forward_hooks for module in net.modules())


def test_a_wrong_name_is_answered_with_the_nearest():
    net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"ModuleDict has no submodule 'encodr'. Nearest names: 'encoder'"):
        Taps(net, ["encodr"])
    with pytest.raises(ValueError, match="it has no submodules"):
        Taps(nn.Linear(1, 1), ["x"])


def test_a_tap_on_something_without_tensors_is_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return None

    net = nn.Sequential(Nothing())
    Taps(net, ["0"])
    with pytest.raises(TypeError, match="The submodule '0' returned NoneType"):
        net(torch.ones(1))


def test_a_term_reads_the_taps_of_both_sides():
    student, teacher = network(), network()
    module = KD(student, teacher, terms={"hint": Hint()})
    x = torch.randn(6, 4)
    losses = module.losses(module.observe((x, torch.zeros(6, dtype=torch.long))))
    expected = (student[:2](x) - teacher[:2](x)).square().mean()
    torch.testing.assert_close(losses["hint"], expected)
    module.export()
    torch.testing.assert_close(module.losses(module.observe((x,)))["hint"], expected)  # the taps are still there
    with pytest.raises(ValueError, match="Linear has no submodule '1'"):
        KD(student, nn.Linear(4, 3), terms={"hint": Hint()})
