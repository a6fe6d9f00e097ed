"""A recovered network for configurations."""

import copy

import pytest
import torch
from torch import nn

from lightning_distill.datamodules import DigitsDataModule, TensorDataModule
from lightning_distill.evaluation import evaluate
from lightning_distill.networks import ConvNet2d
from lightning_distill.quantization import QuantSpec, calibrate, prepare
from lightning_distill.recovery import recovered
from lightning_distill.tasks import Classification

API = "lightning_distill.recovery.recovered"


@pytest.fixture
def data():
    return DigitsDataModule()


@pytest.fixture
def quantized(data):
    """A little trained conv net with 2-bit weights."""
    data.prepare_data()
    data.setup("fit")
    network = ConvNet2d((8, 8))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(3):
        for batch in data.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(batch[0]), batch[1]).backward()
            optimizer.step()
    prepare(network, QuantSpec(weights=2, activations=8))
    calibrate(network, [batch[0] for batch in data.train_dataloader()])
    return network.train()


def accuracy(network, data):
    return evaluate(network, data.val_dataloader(), Classification())["accuracy"]


@pytest.mark.chapter("D34", api=API)
def test_what_helps_most_on_the_validation_data_is_kept(quantized, data):
    before = copy.deepcopy(quantized.state_dict())
    best = recovered(quantized, data)
    assert accuracy(best, data) > accuracy(quantized, data) + 0.01
    assert best.training
    assert all(torch.equal(value, before[name]) for name, value in quantized.state_dict().items())


def test_what_does_not_help_is_not_kept(quantized, data):
    once = recovered(quantized, data, batches=100)
    assert accuracy(recovered(once, data, batches=100), data) >= accuracy(once, data)
    worst = recovered(quantized, data, mode="min")
    assert worst is quantized  # every step raises the accuracy


def test_a_network_without_normalization_has_its_biases_corrected(capfd):
    x = torch.randn(400, 6)
    y = x[:, :3].argmax(dim=1)
    network = prepare(nn.Sequential(nn.Linear(6, 3)), QuantSpec(weights=2))
    splits = {"train": (x[:200], y[:200]), "validation": (x[200:300], y[200:300]), "test": (x[300:], y[300:])}
    best = recovered(network, TensorDataModule(**splits), metric="nll", mode="min")
    assert torch.equal(best[0].weight, network[0].weight)


def test_bad_arguments_are_refused(quantized, data):
    with pytest.raises(ValueError, match="ConvNet2d has no quantized layer"):
        recovered(ConvNet2d((8, 8)), data)
    with pytest.raises(ValueError, match="`batches` must be at least 1, got 0"):
        recovered(quantized, data, batches=0)
    with pytest.raises(ValueError, match=r"`metric` must be one of \['accuracy', .*\], got 'auc'"):
        recovered(quantized, data, metric="auc")
