"""Every distance and every term on features and attention, in real trainings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import KD, FeatureKD
from lightning_distill.datamodules import TensorDataModule
from lightning_distill.losses import (
    DISTANCES,
    ActivationSparsity,
    AttentionMatching,
    AttentionSelfDistillation,
    ContrastiveMatching,
    Decorrelation,
    InfoNCE,
    LipschitzPenalty,
    LowRank,
    Procrustes,
    TemporalInfoNCE,
)
from lightning_distill.tasks import SequenceClassification
from tests.modules.feature_terms_run import CLASSES, batches, bert, refreshed_module

SCRIPT = Path(__file__).with_name("feature_terms_run.py")


class ConvNet(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, width, 3, stride=2), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(self.body(x).mean(dim=(2, 3)))


def images(**arguments):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 1, 12, 12, generator=generator), torch.arange(16) % CLASSES
    return TensorDataModule((x, y), (x, y), batch_size=8, **arguments)


@pytest.mark.parametrize("name", sorted(set(DISTANCES) - {"content_position"}))
def test_every_distance_trains_a_convolutional_student(make_trainer, name):
    torch.manual_seed(1)
    module = FeatureKD(ConvNet(4), ConvNet(6), {"body.3": "body.3"}, distance=name, alpha=1.0)
    before = [parameter.clone() for parameter in module.student.body.parameters()]
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, datamodule=images())
    assert torch.isfinite(trainer.callback_metrics["train/features"])
    moved = [not torch.equal(a, b) for a, b in zip(before, module.student.body.parameters(), strict=True)]
    assert all(moved)
    assert module.export().state_dict().keys() == ConvNet(4).state_dict().keys()


def test_terms_on_attention_and_sequences_train_a_transformer(make_trainer):
    torch.manual_seed(1)
    terms = {
        "attention": AttentionMatching({"attentions.0": "attentions.1", "attentions.-1": "attentions.-1"}),
        "own": AttentionSelfDistillation({"attentions.0": "attentions.-1"}),
        "contrast": ContrastiveMatching({"hidden_states.-1": "hidden_states.-1"}),
        "sparse": ActivationSparsity(["hidden_states.1"]),
        "apart": Decorrelation(["hidden_states.1"]),
        "slope": LipschitzPenalty("hidden_states.0", "hidden_states.-1"),
    }
    module = KD(bert(2, 2), bert(4, 3), terms=terms, task=SequenceClassification())
    loader = DataLoader(batches(8), batch_size=None)
    module.build(next(iter(loader)))
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, loader)
    for name in terms:
        assert torch.isfinite(trainer.callback_metrics[f"train/{name}"]), name
        assert trainer.callback_metrics[f"train/{name}"] > 0, name


@pytest.mark.parametrize("distance", ["content_position", TemporalInfoNCE(), InfoNCE()], ids=["split", "time", "batch"])
def test_distances_along_sequences_train_a_transformer(make_trainer, distance):
    pairs = {"hidden_states.1": "hidden_states.2"}
    module = FeatureKD(bert(2, 2), bert(4, 3), pairs, distance=distance, task=SequenceClassification())
    loader = DataLoader(batches(4), batch_size=None)
    module.build(next(iter(loader)))
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1)
    trainer.fit(module, loader)
    assert torch.isfinite(trainer.callback_metrics["train/features"])


def test_attention_of_deeper_layers_teaches_and_does_not_learn(make_trainer):
    torch.manual_seed(1)
    terms = {"own": AttentionSelfDistillation({"attentions.0": "attentions.2"})}
    module = KD(bert(2, 3), alpha=1.0, terms=terms, task=SequenceClassification())
    step = module.observe(next(iter(batches(1))))
    module.terms["own"](step).sum().backward()
    layers = module.student.base_model.encoder.layer
    assert layers[0].attention.self.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for layer in layers[1:] for parameter in layer.parameters())


@pytest.mark.chapter("A28", "A34", "A50")
def test_what_is_refreshed_resumes_where_it_was(make_trainer, tmp_path):
    def run(max_epochs, resume=None):
        module = refreshed_module()
        trainer = make_trainer(max_epochs=max_epochs)
        trainer.fit(module, DataLoader(batches(5), batch_size=None), ckpt_path=resume)
        return trainer, module

    _, whole = run(3)
    trainer, _ = run(1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    _, resumed = run(3, tmp_path / "first.ckpt")
    for name, value in whole.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.state_dict()[name]), name
        else:
            assert value == resumed.state_dict()[name], name
    assert whole.terms["low_rank"].distances[0].passes == 15
    assert whole.terms["aligned"].alignments[0].passes == 15
    assert isinstance(whole.terms["low_rank"].distances[0], LowRank)
    assert isinstance(whole.terms["moved"].transforms[0], Procrustes)


@pytest.mark.slow
@pytest.mark.chapter("A28", "A34", "A50")
def test_two_processes_refresh_from_the_batches_of_both(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert len(found[0]) == 6
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
    assert not torch.equal(found[0]["aligned.alignments.0.teacher_heads"], torch.arange(4))
    module = refreshed_module()  # one process, one step on both batches
    step = module.observe({key: torch.cat([batch[key] for batch in batches(2)]) for key in next(iter(batches(1)))})
    module.losses(step)
    for name, value in module.terms.state_dict().items():
        if name in found[0] and "basis" not in name:
            torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)
    ours, theirs = (part["low_rank.distances.0.basis"] for part in (found[0], module.terms.state_dict()))
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-3, atol=1e-4)  # the same space
