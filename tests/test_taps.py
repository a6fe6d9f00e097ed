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


def test_keep_what_the_submodules_return_and_get():
    net, x = network(), torch.randn(5, 4)
    taps = Taps(net, ["0", "1", "0", "2@input"])
    with taps.recording() as kept:
        net(x)
    assert list(kept) == ["0", "1", "2@input"]
    torch.testing.assert_close(kept["1"], net[1](net[0](x)))
    assert kept["2@input"] is kept["1"]


def test_keep_the_last_pass_of_a_recording_and_nothing_outside():
    net = network()
    taps = Taps(net, ["0"])
    net(torch.randn(7, 4))
    with taps.recording() as kept:
        assert kept == {}
        net(torch.randn(5, 4))
        net(torch.randn(6, 4))
    net(torch.randn(8, 4))
    assert kept["0"].shape == (6, 8)
    with taps.recording() as empty:
        pass
    assert empty == {}


def test_inputs_by_keyword_are_found():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(3)

        def forward(self, x):
            return self.norm(input=x)

    net, x = Outer(), torch.randn(2, 3)
    with Taps(net, ["norm@input"]).recording() as kept:
        net(x)
    assert kept["norm@input"] is x


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_activation_checkpointing_repeats_is_not_kept(use_reentrant):
    net, x = network(), torch.randn(5, 4, requires_grad=True)
    with Taps(net, ["1"]).recording() as kept:
        out = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=use_reentrant)
    first = kept["1"]
    assert first.requires_grad is not use_reentrant
    loss = out.sum() if use_reentrant else out.sum() + first.sum()
    loss.backward()  # runs the network again
    assert kept["1"] is first
    if not use_reentrant:
        y = x.detach().requires_grad_()
        (net(y).sum() + net[:2](y).sum()).backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks
def test_compiled_networks_are_tapped():
    net, x = network(), torch.randn(5, 4)
    taps = Taps(net, ["1"])
    expected = net[:2](x)
    net.compile(backend="aot_eager")
    for _ in range(2):
        with taps.recording() as kept:
            net(x)
        torch.testing.assert_close(kept["1"], expected)
        assert kept["1"].requires_grad


def test_leave_no_hook_behind():
    net = network()
    taps = Taps(net, ["0", "1@input"])
    assert net[0]._forward_hooks
    assert net[1]._forward_pre_hooks
    taps.remove()
    with taps.recording() as kept:
        net(torch.randn(1, 4))
    assert kept == {}
    Taps(net, [])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_a_wrong_name_is_answered_with_the_nearest():
    net = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"ModuleDict has no submodule 'encodr'. Nearest names: 'encoder'"):
        Taps(net, ["encodr"])
    with pytest.raises(ValueError, match="it has no submodules"):
        Taps(nn.Linear(1, 1), ["x"])
    with pytest.raises(ValueError, match=r"ModuleDict has no submodule 'hidden_states.0'"):
        Taps(net, ["hidden_states.0"])


def test_a_tap_on_something_without_tensors_is_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return None

    net = nn.Sequential(Nothing())
    taps = Taps(net, ["0"])
    net(torch.ones(1))  # nobody wants it now
    with pytest.raises(TypeError, match="The tap '0' found NoneType"), taps.recording():
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
