"""Ablations of a teacher: confidence alone, dark knowledge in disorder."""

import pytest
import torch
from torch import nn

from lightning_distill import KD, Outputs, Step
from lightning_distill.losses import (
    ConfidenceWeights,
    PermutedTargets,
    SoftTargets,
    confidence_weights,
    kl_divergence,
    permute_other_classes,
)


@pytest.mark.chapter("B04", api="lightning_distill.losses.confidence_weights")
def test_weights_are_shares_of_confidence():
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, -1.0], [1e4, 0.0, 0.0]])
    found = confidence_weights(logits)
    confidence = logits.softmax(-1).max(-1).values
    torch.testing.assert_close(found, confidence / confidence.sum())
    assert found.sum().item() == pytest.approx(1)
    assert confidence_weights(logits.bfloat16()).dtype == torch.float32
    assert confidence_weights(torch.zeros(5, 4)).tolist() == pytest.approx([0.2] * 5)


@pytest.mark.chapter("B04", api="lightning_distill.losses.ConfidenceWeights")
def test_the_rule_weighs_the_labels_loss():
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    teacher = nn.Linear(4, 3)
    module = KD(nn.Linear(4, 3), teacher, alpha=1.0, item_weights={"hard": ConfidenceWeights()})
    loss = module.losses(module.observe((x, y)))["hard"]
    each = nn.functional.cross_entropy(module.student(x), y, reduction="none")
    torch.testing.assert_close(loss, (confidence_weights(teacher(x)) * each).sum())
    nobody = Step(None, Outputs(torch.zeros(2, 3)))
    assert ConfidenceWeights()(nobody) == 1


@pytest.mark.chapter("B04", api="lightning_distill.losses.permute_other_classes")
@pytest.mark.parametrize("given", [True, False])
def test_the_target_stays_and_the_others_are_permuted(given):
    torch.manual_seed(1)
    logits = torch.randn(200, 6)
    target = torch.randint(0, 6, (200,)) if given else None
    found = permute_other_classes(logits, target)
    place = (logits.argmax(-1) if target is None else target).unsqueeze(1)
    assert torch.equal(found.gather(1, place), logits.gather(1, place))
    assert torch.equal(found.sort(dim=1).values, logits.sort(dim=1).values)
    moved = (found != logits).float().mean(0)
    assert (moved > 0.5).all()  # 5/6 of the time another class, 4/5 of that another value
    first, again = (permute_other_classes(logits, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.chapter("B04")
def test_every_order_of_the_others_is_as_likely():
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0]]).expand(6000, 4)
    found = permute_other_classes(logits, generator=torch.Generator().manual_seed(0))
    assert (found[:, 0] == 9).all()
    orders, counts = torch.unique(found, dim=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 850
    assert counts.max() < 1150


@pytest.mark.chapter("B04", api="lightning_distill.losses.PermutedTargets")
def test_the_term_is_the_divergence_from_the_permuted_teacher():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    step = Step(None, Outputs(student), Outputs(teacher), temperature=2.0)
    torch.manual_seed(7)
    value = PermutedTargets()(step)
    torch.manual_seed(7)
    expected = kl_divergence(student, permute_other_classes(teacher.detach()), temperature=2.0)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None
    two = Step(None, Outputs(student[:, :2]), Outputs(teacher[:, :2]))
    torch.testing.assert_close(PermutedTargets()(two), SoftTargets()(two))  # one other class: nothing to permute
