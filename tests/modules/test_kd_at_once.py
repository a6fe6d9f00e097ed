"""KD computes both losses at once where that gives the same numbers, and apart everywhere else."""

import pytest
import torch
from torch import nn

from lightning_distill import KD
from lightning_distill.losses import DIST, CrossEntropy, SoftTargets
from lightning_distill.modules import kd
from lightning_distill.tasks import Classification
from lightning_distill.weighting import FixedWeights, Weighting


class Doubled(SoftTargets):
    def forward(self, step):
        return 2 * super().forward(step)


class Squares(Weighting):
    def forward(self, losses):
        return sum(loss**2 for loss in losses.values())

    def weights(self):
        return {}


class MostlyZero(FixedWeights):
    def forward(self, losses):
        return 0.01 * super().forward(losses)


class Masked(Classification):
    def mask(self, batch, outputs):
        return torch.arange(12) < 7


def module_of(**kwargs):
    torch.manual_seed(0)
    return KD(nn.Linear(4, 3), nn.Linear(4, 3), 4.0, 0.3, **kwargs)


def batch(labelled=True, probabilities=False):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 3
    labels[:5] = -100
    if probabilities:
        labels = x[:, :3].softmax(-1)
    return (x, labels) if labelled else (x,)


AT_ONCE = {
    "default": {},
    "label smoothing": {"task": Classification(label_smoothing=0.1)},
    "other weights": {"weights": {"hard": 0.0, "soft": 2.0}},
    "cold": {"temperature": 0.25},
    "a rule that gives a number": {"temperature": lambda step: 3.0},
}
APART = {
    "item weights": {"item_weights": {"soft": lambda step: torch.arange(12.0)}},
    "item weights of every term": {"item_weights": {"*": lambda step: torch.arange(12.0)}},
    "mask": {"task": Masked()},
    "temperature of each item": {"temperature": lambda step: torch.arange(12.0) + 1},
    "reverse": {"terms": {"soft": SoftTargets(beta=1.0)}},
    "skewed": {"terms": {"soft": SoftTargets(skew=0.1)}},
    "a subclass": {"terms": {"soft": Doubled()}},
    "another loss on labels": {"terms": {"hard": DIST()}},
    "one more term": {"terms": {"more": CrossEntropy()}},
    "another weighting": {"weights": Squares()},
    "a weighting that inherits": {"weights": MostlyZero({"hard": 1.0, "soft": 1.0})},
}


@pytest.fixture
def calls(monkeypatch):
    made = []

    def counted(*args, **kwargs):
        made.append(kwargs)
        return original(*args, **kwargs)

    original = kd.hard_and_soft
    monkeypatch.setattr(kd, "hard_and_soft", counted)
    return made


def build(kwargs):
    temperature = kwargs.get("temperature")
    module = module_of(**{name: value for name, value in kwargs.items() if name != "temperature"})
    module.temperature = temperature or module.temperature
    return module


def check(module, step):
    """``loss`` is what ``losses`` and ``weighting`` give, with its gradient."""
    total, losses = module.loss(step)
    expected = module.losses(step)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(total, module.weighting(expected))
    weight = module.student.weight
    one, other = (
        torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (total, module.weighting(expected))
    )
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert list(losses) == list(expected)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("kwargs", AT_ONCE.values(), ids=AT_ONCE.keys())
def test_at_once(kwargs, probabilities, calls):
    module = build(kwargs)
    check(module, module.observe(batch(probabilities=probabilities)))
    assert len(calls) == 1


@pytest.mark.parametrize("kwargs", APART.values(), ids=APART.keys())
def test_apart(kwargs, calls):
    module = build(kwargs)
    check(module, module.observe(batch()))
    assert calls == []


def test_a_batch_without_labels(calls):
    module = module_of()
    check(module, module.observe(batch(labelled=False)))
    assert calls == []


def test_knobs_are_read_anew_in_every_step(calls):
    module = module_of()
    step = module.observe(batch())
    for turn in (
        lambda: module.weighting.values.update(soft=5.0),
        lambda: module.terms.update({"soft": SoftTargets(scale_by_t2=False)}),
        lambda: module.item_weights.update(hard=lambda step: torch.arange(12.0)),
        lambda: setattr(module, "weighting", Squares()),
    ):
        turn()
        check(module, step)
    assert len(calls) == 2


def test_says_what_to_do_without_a_teacher():
    module = KD(nn.Linear(4, 3))
    with pytest.raises(ValueError, match="compares the student with a teacher, but there is none"):
        module.loss(module.observe(batch()))
