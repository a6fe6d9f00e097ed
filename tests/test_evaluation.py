"""Measuring without a Trainer."""

import pytest
import torch
from torch import nn

from lightning_distill.evaluation import evaluate
from lightning_distill.tasks import Classification


@pytest.fixture
def batches():
    return [(torch.eye(3), torch.tensor([0, 1, 0])), (torch.eye(3)[:1], torch.tensor([0]))]


@pytest.mark.parametrize("reference", [None, nn.Identity()])
def test_one_process_of_several_measures_alone(batches, monkeypatch, reference):
    expected = evaluate(nn.Identity(), batches, Classification(), reference=reference)
    assert expected["accuracy"] == 0.75
    # a metric that asked the other processes would find that there is no group
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="process group"):
        torch.distributed.barrier()
    found = evaluate(nn.Identity(), batches, Classification(), reference=reference)
    assert found == expected
    assert ("agreement" in found) == (reference is not None)
