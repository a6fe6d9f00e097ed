"""Mixup against golden numbers, and what the trained networks get to see."""

import math

import pytest
import torch

from lightning_distill.losses import Mixup, cross_entropy, mixup
from lightning_distill.losses.mixup import one_hot


@pytest.mark.chapter("A56", api="lightning_distill.losses.mixup")
def test_matches_golden(golden):
    case = golden("mixup")
    x = torch.stack([case.inputs["x1"], case.inputs["x2"]])
    y = torch.stack([case.inputs["y1"], case.inputs["y2"]])
    mixed_x, mixed_y = mixup(x, y, torch.tensor([1, 0]), lam=case.inputs["lam"])
    torch.testing.assert_close(mixed_x[0], case.expected["x"], rtol=case.rtol, atol=case.atol)
    torch.testing.assert_close(mixed_y[0], case.expected["y"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("A56")
def test_lam_1_changes_nothing_and_lam_0_permutes():
    x, y, permutation = torch.randn(5, 2, 3), torch.rand(5, 4), torch.randperm(5)
    assert all(torch.equal(a, b) for a, b in zip(mixup(x, y, permutation, lam=1.0), (x, y), strict=True))
    permuted = x[permutation], y[permutation]
    assert all(torch.equal(a, b) for a, b in zip(mixup(x, y, permutation, lam=0.0), permuted, strict=True))


@pytest.mark.chapter("A56", api="lightning_distill.losses.Mixup")
def test_inputs_and_labels_are_blended_alike():
    """Inputs that are their own one-hot labels stay so."""
    labels = torch.tensor([0, 2, 1, 1, 0, 2])
    x, y = Mixup(alpha=1.0, num_classes=3)((torch.eye(3)[labels], labels))
    torch.testing.assert_close(x, y)
    assert not torch.equal(x, torch.eye(3)[labels])
    torch.testing.assert_close(y.sum(dim=-1), torch.ones(6))


def test_lam_follows_the_beta_distribution():
    transform, batch = Mixup(alpha=0.2, num_classes=2), (torch.zeros(1, 1), torch.zeros(1).long())
    lams = torch.tensor([float(transform._beta.sample()) for _ in range(4000)])
    assert lams.mean().item() == pytest.approx(0.5, abs=0.03)
    assert lams.var().item() == pytest.approx(1 / (4 * (2 * 0.2 + 1)), abs=0.01)  # of Beta(a, a)
    assert transform(batch)[0].shape == (1, 1)


def test_the_same_seed_gives_the_same_blend():
    transform, batch = Mixup(num_classes=3), (torch.randn(8, 2), torch.arange(8) % 3)
    torch.manual_seed(3)
    first = transform(batch)
    torch.manual_seed(3)
    second = transform(batch)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], transform(batch)[0])


def test_an_unlabelled_half_adds_nothing_to_the_loss_on_labels():
    logits, lam = torch.randn(2, 3).double(), 0.3
    labels = torch.tensor([1, -100])
    _, mixed = mixup(torch.zeros(2, 1), one_hot(labels, num_classes=3), torch.tensor([1, 0]), lam=lam)
    loss = cross_entropy(logits, mixed)
    of_class_1 = cross_entropy(logits, torch.tensor([1, 1]))
    torch.testing.assert_close(loss, torch.tensor([lam, 1 - lam]).double() * of_class_1, rtol=1e-6, atol=0)
    unlabelled = one_hot(torch.tensor([-100, -100]), num_classes=3)
    assert cross_entropy(logits, unlabelled).tolist() == [0.0, 0.0]


def test_mappings_keep_their_other_entries_and_lose_the_index():
    batch = {"x": torch.randn(4, 2), "y": torch.arange(4) % 3, "index": torch.arange(4), "name": "a"}
    mixed = Mixup(num_classes=3)(batch)
    assert set(mixed) == {"x", "y", "name"}
    assert mixed["y"].shape == (4, 3)
    assert set(batch) == {"x", "y", "index", "name"}
    assert len(Mixup(num_classes=3)((batch["x"], batch["y"], batch["index"]))) == 2
    renamed = Mixup(num_classes=3, input_key="image", label_key="target")({"image": batch["x"], "target": batch["y"]})
    assert renamed["target"].shape == (4, 3)


def test_probabilities_stay_probabilities():
    x, y = torch.randn(4, 2), torch.rand(4, 3).softmax(-1)
    torch.testing.assert_close(Mixup(num_classes=3)((x, y))[1].sum(-1), torch.ones(4))


def test_errors_name_the_fix():
    x, labels = torch.randn(4, 2), torch.arange(4) % 3
    with pytest.raises(ValueError, match="`alpha` must be positive and finite, got 0"):
        Mixup(alpha=0, num_classes=3)
    with pytest.raises(ValueError, match="`alpha` must be positive and finite, got nan"):
        Mixup(alpha=math.nan, num_classes=3)
    with pytest.raises(ValueError, match="`num_classes` must be positive, got 0"):
        Mixup(num_classes=0)
    with pytest.raises(ValueError, match=r"no 'y': its keys are \['x', 'label'\]. Name it: `label_key=...`"):
        Mixup(num_classes=3)({"x": x, "label": labels})
    with pytest.raises(TypeError, match=r"expects a batch \(inputs, labels\) or a mapping, got Tensor"):
        Mixup(num_classes=3)(x)
    with pytest.raises(TypeError, match=r"`inputs` must be floating-point.*token ids cannot be blended"):
        Mixup(num_classes=3)((labels, labels))
    with pytest.raises(TypeError, match=r"`targets` must be floating-point.*one_hot"):
        mixup(x, labels, torch.arange(4), lam=0.5)
    with pytest.raises(ValueError, match=r"`lam` must be in \[0, 1\], got nan"):
        mixup(x, x, torch.arange(4), lam=math.nan)
