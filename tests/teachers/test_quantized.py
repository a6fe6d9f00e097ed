"""An ensemble of quantized copies, against the mean of their probabilities."""

import copy

import pytest
import torch

from lightning_distill import KD
from lightning_distill.networks import MLP
from lightning_distill.quantization import QuantSpec, calibrate, prepare
from lightning_distill.tasks import Regression
from lightning_distill.teachers import quantized_ensemble

SPECS = [QuantSpec(2), QuantSpec(3, activations=6), QuantSpec(4, granularity="tensor")]


@pytest.mark.chapter("D31", api="lightning_distill.teachers.quantized_ensemble")
def test_the_ensemble_says_the_mean_of_its_members_probabilities_and_is_no_worse_than_they_are():
    network, x = MLP((6, 8, 3)), torch.randn(40, 6)
    before = copy.deepcopy(network.state_dict())
    ensemble = quantized_ensemble(network, SPECS, [(x,)])
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in before.items())
    members = []
    for spec in SPECS:
        member = prepare(copy.deepcopy(network), spec)
        calibrate(member, [x])
        members.append(member(x))
    assert len({tuple(said.flatten().tolist()) for said in members}) == 3
    mean = torch.stack([said.softmax(dim=1) for said in members]).mean(dim=0)
    torch.testing.assert_close(ensemble(x).softmax(dim=1), mean)
    labels = torch.randint(3, (40,))
    losses = [torch.nn.functional.cross_entropy(said, labels) for said in (*members, ensemble(x))]
    assert losses[-1] <= sum(losses[:-1]) / 3
    averaged = quantized_ensemble(network, SPECS[:1] * 2, task=Regression())
    torch.testing.assert_close(averaged(x), members[0])


def test_it_teaches(make_trainer):
    torch.manual_seed(0)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    module = KD(MLP((6, 8, 3)), quantized_ensemble(MLP((6, 8, 3)), SPECS, [x]), alpha=0.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    make_trainer(max_epochs=2).fit(module, loader)
    assert "teacher" not in "".join(module.state_dict())


def test_bad_ensembles_are_refused():
    with pytest.raises(ValueError, match="`specs` must hold at least one"):
        quantized_ensemble(MLP((6, 3)), [])
    with pytest.raises(ValueError, match="No batch came by the layers"):
        quantized_ensemble(MLP((6, 3)), SPECS)
