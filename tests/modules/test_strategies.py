"""What is taken into account of strategies that cannot be run here."""

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.losses import FusedKD, SparseKD, fused
from lightning_distill.outputs import Outputs, Step
from lightning_distill.tasks import CausalLM
from lightning_distill.top_k import encode_top_k


class Accumulates(SingleDeviceStrategy):
    """As DeepSpeed: it takes every micro-batch for an optimizer step and divides by their number itself."""

    handles_gradient_accumulation = True


def data():
    return TensorDataset(torch.linspace(-1, 1, 64).reshape(16, 4), torch.arange(16) % 3)


def test_a_strategy_that_accumulates_itself_gets_the_gradient_of_each_micro_batch(make_trainer):
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    before = student.weight.detach().clone()
    gradients = []

    class Watch(KD):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            gradients.append(self.student.weight.grad.clone())

    module = Watch(student, teacher, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer = make_trainer(strategy=Accumulates("cpu"), accumulate_grad_batches=2, max_epochs=1)
    with pytest.warns(UserWarning, match="Accumulates accumulates gradients by itself, as the mean of the means"):
        trainer.fit(module, DataLoader(data(), batch_size=8))
    assert torch.equal(student.weight, before)
    student.zero_grad()
    for gradient, batch in zip(gradients, DataLoader(data(), batch_size=8), strict=True):
        plain = KD(student, teacher)
        plain.weighting(plain.losses(plain.observe(batch))).backward()  # adds up
        torch.testing.assert_close(gradient, student.weight.grad / 2)  # the Trainer's own division, and no more


class Partitioned(nn.Linear):
    """As under ZeRO-3: the weight is there while the layer is called, and empty otherwise."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.whole = linear.weight
        self.weight = nn.Parameter(torch.empty(0))

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.whole)


@pytest.mark.parametrize("name", ["fused", "sparse"])
def test_an_output_layer_that_is_empty_between_calls_is_called(monkeypatch, name):
    monkeypatch.setattr(fused, "PLAIN_BYTES", 0)
    hidden, target = torch.randn(5, 4), torch.randn(5, 30)
    head, labels = nn.Linear(4, 30, bias=False), torch.arange(5)
    top_k = encode_top_k(target, k=4, temperatures=(1.0,))
    term, teacher = (FusedKD(), Outputs(target)) if name == "fused" else (SparseKD(), Outputs(top_k=top_k))
    values, gradients = [], []
    for layer in (head, Partitioned(head)):
        leaf = hidden.clone().requires_grad_()
        value = term(Step({}, Outputs(hidden=leaf, head=layer), teacher, labels))
        (gradient,) = torch.autograd.grad(value, leaf)
        values.append(value)
        gradients.append(gradient)
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_size_of_the_vocabulary_is_known_without_the_weight():
    outputs = Outputs(hidden=torch.zeros(2, 4), head=Partitioned(nn.Linear(4, 30, bias=False)))
    CausalLM().check(outputs, torch.tensor([3, 29]))
    with pytest.raises(ValueError, match="Token 30 is outside the student's vocabulary of 30"):
        CausalLM().check(outputs, torch.tensor([3, 30]))
