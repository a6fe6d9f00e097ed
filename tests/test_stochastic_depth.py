"""Stochastic depth: what is dropped, how it is scaled, and self-distillation from the whole network."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import SequenceClassification, StochasticDepthSelfKD
from lightning_distill.diagnostics import subnet_agreement
from lightning_distill.losses import kl_divergence
from lightning_distill.networks import from_config
from lightning_distill.stochastic_depth import (
    StochasticDepth,
    add_stochastic_depth,
    remove_stochastic_depth,
    survival_probabilities,
)
from lightning_distill.teachers import WholeNetworkTeacher


class Residual(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.inner(x).relu()


def network(blocks=4, width=6, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        return nn.Sequential(nn.Linear(5, width), layers, nn.Linear(width, 3))


def data(items=32):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(items, 5, generator=generator), torch.randint(0, 3, (items,), generator=generator))


BLOCKS = [f"1.{i}" for i in range(4)]


@pytest.mark.chapter("B20", api="lightning_distill.stochastic_depth.survival_probabilities")
def test_survival_probabilities_are_the_golden_ones(golden):
    case = golden("stochastic_depth_survival")
    found = survival_probabilities(case.inputs["L"], case.inputs["p_L"])
    assert found == pytest.approx(case.expected["p"].tolist(), rel=case.rtol)
    assert sum(found) == pytest.approx(case.expected["expected_active"])
    assert sum(survival_probabilities(24, 0.5)) == pytest.approx(17.75)
    assert survival_probabilities(5, 1.0) == [1.0] * 5


@pytest.mark.chapter("B20")
@pytest.mark.erratum("ERR-40")
def test_the_printed_symbol_is_the_probability_of_the_last_block_and_not_of_the_first():
    printed = [1 - layer / 6 * (1 - 0.5) for layer in range(7)]  # with "p_0" = 0.5
    assert printed[0] == 1.0
    assert printed[-1] == 0.5
    assert survival_probabilities(6, 0.5) == printed[1:]
    # printed without scaling, a block is met with p = 0.5 in training and with certainty afterwards
    block = StochasticDepth(Residual(), 0.5, scale="test")
    x = torch.randn(2, 6)
    torch.testing.assert_close(block.eval()(x), x + 0.5 * (block.block(x) - x))


@pytest.mark.chapter("B20", api="lightning_distill.stochastic_depth.StochasticDepth")
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize(("scale", "expected"), [("train", 1.0), ("test", 0.7)])
def test_the_mean_over_draws_is_what_eval_mode_gives(mode, scale, expected):
    block = StochasticDepth(Residual(), 0.7, mode=mode, scale=scale)
    x = torch.randn(1, 6)
    residual = (block.block(x) - x).detach()
    with torch.no_grad():
        draws = torch.stack([block(x) for _ in range(4000)])
        torch.testing.assert_close(block.eval()(x), x + expected * residual)
    factors = ((draws - x) * residual).sum(-1) / residual.square().sum()
    kept = 1 / 0.7 if scale == "train" else 1.0
    assert (((factors - kept).abs() < 1e-4) | (factors.abs() < 1e-4)).all()
    assert factors.mean().item() == pytest.approx(expected, abs=0.05)


def test_a_row_is_drawn_for_itself_and_a_batch_at_once():
    x = torch.ones(64, 6)
    row = StochasticDepth(Residual(), 0.5)(x)
    assert 0 < (row == x).all(dim=1).sum() < 64
    block = StochasticDepth(Residual(), 0.5, mode="batch")
    seen = {int((block(x) == x).all(dim=1).sum()) for _ in range(20)}
    assert seen == {0, 64}
    assert 0 < block.block.calls < 20  # left out is not computed


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_certain_survival_is_the_block_itself(mode):
    block = StochasticDepth(Residual(), 1.0, mode=mode)
    x = torch.randn(3, 6)
    assert torch.equal(block(x), block.block(x))
    assert torch.equal(block.eval()(x), block.block(x))


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_a_block_that_is_left_out_has_gradients_of_zero(mode):
    block = StochasticDepth(Residual(), 1e-9, mode=mode)
    x = torch.randn(3, 6, requires_grad=True)
    block(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.ones_like(x))
    assert all(parameter.grad.abs().max() == 0 for parameter in block.parameters())


def test_tuples_keep_what_else_they_hold():
    class Tupled(Residual):
        def forward(self, x, scale=1.0):
            return super().forward(x) * scale, "attention"

    block = StochasticDepth(Tupled(), 0.5, scale="test").eval()
    x = torch.randn(2, 6)
    y, said = block(x, scale=2.0)
    torch.testing.assert_close(y, (x + block.block(x, scale=2.0)[0]) / 2)
    assert said == "attention"


def test_blocks_are_wrapped_with_falling_probabilities_and_unwrapped_again():
    plain, wrapped = network(), network()
    assert add_stochastic_depth(wrapped, BLOCKS, last=0.6) is wrapped
    assert [wrapped.get_submodule(name).survival for name in BLOCKS] == survival_probabilities(4, 0.6)
    x = data().tensors[0]
    assert torch.equal(wrapped.eval()(x), plain(x))
    remove_stochastic_depth(wrapped)
    assert wrapped.state_dict().keys() == plain.state_dict().keys()
    nested = nn.Sequential(nn.Sequential(Residual()))
    before = list(nested.state_dict())
    add_stochastic_depth(nested, ["0", "0.0"])
    assert list(remove_stochastic_depth(nested).state_dict()) == before


@pytest.mark.chapter("B20", api="lightning_distill.StochasticDepthSelfKD")
def test_the_subnetwork_learns_from_the_whole_network(make_trainer):
    module = StochasticDepthSelfKD(network(), BLOCKS, alpha=0.25, temperature=2.0)
    x, y = data().tensors
    step = module.observe((x, y))
    whole = module.export()
    torch.testing.assert_close(step.teacher.logits, whole(x))
    assert not step.teacher.logits.requires_grad
    assert not torch.allclose(step.student.logits, step.teacher.logits)
    losses = module.losses(step)
    expected = kl_divergence(step.student.logits, whole(x), temperature=2.0).mean()
    torch.testing.assert_close(losses["soft"], expected)
    total = module.weighting(losses)
    torch.testing.assert_close(total, 0.25 * losses["hard"] + 0.75 * losses["soft"])
    assert module.student.training

    trainer = make_trainer(max_epochs=2)
    trainer.fit(module, DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=8))
    assert trainer.callback_metrics["val/agreement"] == 1  # in validation both are the whole network


def test_the_export_has_no_trace_of_the_wrappers(tmp_path):
    module = StochasticDepthSelfKD(network(), BLOCKS)
    exported = module.export(tmp_path / "student.safetensors")
    assert exported.state_dict().keys() == network().state_dict().keys()
    assert (tmp_path / "student.safetensors").exists()
    torch.testing.assert_close(exported(data().tensors[0]), module.student.eval()(data().tensors[0]))
    kept = StochasticDepthSelfKD(network(), BLOCKS, scale="test")
    assert sum(isinstance(part, StochasticDepth) for part in kept.export().modules()) == 4
    torch.testing.assert_close(kept.export()(data().tensors[0]), kept.student.eval()(data().tensors[0]))


def test_transformers_blocks_can_be_left_out():
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    student = from_config("bert", "sequence-classification", settings | {"intermediate_size": 32, "num_labels": 4})
    names = list(student.state_dict())
    blocks = [f"bert.encoder.layer.{i}" for i in range(3)]
    module = StochasticDepthSelfKD(student, blocks, task=SequenceClassification(), mode="batch")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = {"input_ids": torch.randint(0, 50, (2, 4)), "attention_mask": mask, "labels": torch.tensor([0, 3])}
    module.weighting(module.losses(module.observe(batch))).backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.student.parameters())
    assert list(module.export().state_dict()) == names


def test_without_dropping_there_is_nothing_to_learn_from_oneself():
    module = StochasticDepthSelfKD(network(), BLOCKS, last=1.0)
    assert module.losses(module.observe(data().tensors))["soft"].abs() < 1e-6


def test_the_whole_network_is_tapped_without_disturbing_the_student():
    student = network()
    teacher = WholeNetworkTeacher(student)
    teacher.tap(["1.0"])
    module = StochasticDepthSelfKD(student, BLOCKS)
    outputs = teacher(data().tensors, module.task)
    assert outputs.features["1.0"].shape == (32, 6)
    with pytest.raises(ValueError, match="has no submodule 'nowhere'"):
        teacher.tap(["nowhere"])


@pytest.mark.chapter("B20", api="lightning_distill.diagnostics.subnet_agreement")
def test_training_brings_the_subnetworks_closer_to_the_whole(make_trainer):
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 5, generator=generator)
    y = (x[:, :3] + 0.5 * x[:, 2:]).argmax(dim=1)
    student = network(width=16)
    for block in student[1]:
        nn.init.normal_(block.inner.weight, std=0.5)
    module = StochasticDepthSelfKD(
        student, BLOCKS, alpha=0.5, temperature=1.0, optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3)
    )
    before = subnet_agreement(module.student, [(x, y)])
    make_trainer(max_epochs=30).fit(module, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
    after = subnet_agreement(module.student, [(x, y)])
    assert after.divergence.high < before.divergence.low
    assert after.agreement.value > before.agreement.value
    assert before.divergence.n == 20
    again = subnet_agreement(module.student, [(x[:100], y[:100]), (x[100:], y[100:])])
    assert again.divergence.value == pytest.approx(after.divergence.value)
    assert module.student.training


def test_subnetworks_of_a_network_that_never_drops_agree_with_it():
    certain = add_stochastic_depth(network(), BLOCKS, last=1.0)
    found = subnet_agreement(certain, [data().tensors], subnets=3)
    assert found.divergence.value == pytest.approx(0, abs=1e-9)
    assert found.agreement.value == 1
    with pytest.raises(ValueError, match=r"must have blocks in `StochasticDepth`.*got 0, 1 and 20"):
        subnet_agreement(network(), [data().tensors])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: survival_probabilities(0), "`blocks` must be positive, got 0"),
        (lambda: survival_probabilities(3, 0.0), r"`last`, the probability to be kept, must be in \(0, 1\], got 0.0"),
        (lambda: StochasticDepth(nn.Identity(), 1.5), r"`survival`, .* must be in \(0, 1\], got 1.5"),
        (lambda: StochasticDepth(nn.Identity(), mode="column"), "`mode` must be 'batch' or 'row', got 'column'"),
        (lambda: StochasticDepth(nn.Identity(), scale="none"), "`scale` must be 'train' or 'test', got 'none'"),
        (lambda: StochasticDepth(nn.Linear(6, 4))(torch.zeros(2, 6)), r"Linear made \(2, 4\) of \(2, 6\)"),
        (lambda: add_stochastic_depth(network(), []), "`blocks` must name at least one residual block"),
        (lambda: add_stochastic_depth(network(), ["1.9"]), "names '1.9', which Sequential does not have"),
        (lambda: add_stochastic_depth(network(), ["1.0", "1.0"]), "wrapped already, or named twice"),
        (
            lambda: remove_stochastic_depth(add_stochastic_depth(network(), BLOCKS, scale="test")),
            "is scaled in eval mode",
        ),
    ],
)
def test_refuses_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()
