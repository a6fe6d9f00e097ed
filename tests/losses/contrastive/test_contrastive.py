"""InfoNCE, its negatives and its similarities."""

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from lightning_distill.losses import ContrastiveMatching, FeatureMatching
from lightning_distill.losses.contrastive import (
    BilinearSimilarity,
    InfoNCE,
    PerturbationInfoNCE,
    TemporalInfoNCE,
    cosine_similarity,
    info_nce,
    perturbed,
    temporal_exclusions,
)
from lightning_distill.outputs import Outputs, Step
from tests.losses.contrastive.two_processes import loss_and_gradients, whole_batch

API = "lightning_distill.losses.contrastive."
SCRIPT = Path(__file__).with_name("two_processes.py")


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value, expected, rtol=1e-9, atol=1e-11):
    value, expected = (torch.as_tensor(side, dtype=torch.float64) for side in (value, expected))
    torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


@pytest.mark.chapter("A72", "A73", api=API + "info_nce")
def test_in_batch_negatives_match_golden_and_cross_entropy(golden):
    case = golden("infonce_in_batch")
    student, teacher, tau = (case.inputs[name] for name in ("h_S", "h_T", "tau"))
    close(InfoNCE(float(tau))(student, teacher).mean(), case.expected["standard"])
    decoupled = InfoNCE(float(tau), include_positive=False)(student, teacher).mean()
    close(decoupled, case.expected["as_written_negatives_only"])
    similarity = cosine_similarity(student, teacher)
    expected = torch.nn.functional.cross_entropy(similarity / tau, torch.arange(3), reduction="none")
    close(info_nce(similarity, temperature=float(tau)), expected)


@pytest.mark.chapter("A72")
@pytest.mark.erratum("ERR-29")
def test_without_the_positive_in_the_denominator_there_is_no_lower_bound():
    """Printed: -log(exp(s+ / tau) / sum of the negatives)."""
    perfect = 2 * torch.eye(4, dtype=torch.float64) - 1
    values = [
        (info_nce(perfect, temperature=t).max(), info_nce(perfect, temperature=t, include_positive=False).max())
        for t in (1.0, 0.1, 0.01)
    ]
    assert all(ours >= 0 for ours, _ in values)
    assert values[-1][0] < 1e-8
    assert [round(float(printed)) for _, printed in values] == [-1, -19, -199]


@pytest.mark.chapter("A74", api=API + "TemporalInfoNCE")
def test_temporal_negatives_match_golden(golden):
    case = golden("infonce_temporal")
    student, teacher = case.inputs["h_S"], case.inputs["h_T"]
    values = TemporalInfoNCE(min_gap=2, temperature=0.2)(student, teacher)
    close(values[0], case.expected["loss_per_t"])
    assert TemporalInfoNCE(min_gap=9)(student, teacher).abs().max() == 0  # nobody left but the positive
    assert temporal_exclusions(3, 1).tolist() == torch.eye(3).bool().tolist()


@pytest.mark.chapter("A74")
def test_padding_is_no_negative():
    student, teacher = features(2, 5, 3, seed=1), features(2, 5, 3, seed=2)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    values = TemporalInfoNCE(min_gap=1)(student, teacher, mask)
    close(values[0, :4], TemporalInfoNCE(min_gap=1)(student[:1, :4], teacher[:1, :4])[0])
    assert values[1].abs().max() == 0
    assert values[0, 4] == 0


@pytest.mark.chapter("A75", api=API + "PerturbationInfoNCE")
def test_perturbation_matches_golden(golden):
    case = golden("infonce_perturbation")
    own = case.inputs["h_pos"]
    candidates = torch.cat([own[None], own + case.inputs["noise"]])
    similarity = cosine_similarity(case.inputs["h_S"][None], candidates)
    close(info_nce(similarity, torch.tensor([0]), temperature=float(case.inputs["tau"]))[0], case.expected["loss"])


@pytest.mark.chapter("A75")
def test_noise_has_the_spread_of_each_feature():
    vectors = features(4000, 3) * torch.tensor([1.0, 5.0, 0.1])
    noise = perturbed(vectors, sigma=0.5, number=4) - vectors.unsqueeze(1)
    torch.testing.assert_close(noise.std(dim=(0, 1)), 0.5 * vectors.std(dim=0), rtol=0.05, atol=0)
    assert perturbed(features(1, 3), number=2).isfinite().all()
    same = [perturbed(vectors[:5], generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*same)


@pytest.mark.chapter("A75")
@pytest.mark.erratum("ERR-30")
def test_a_negative_that_is_the_positive_sets_a_floor():
    """Printed: h_T + noise as a negative, of any size."""
    teacher = features(6, 8)
    with pytest.warns(UserWarning, match=r"`sigma=0.001` makes negatives that are nearly the positive.*log\(2\)"):
        near = PerturbationInfoNCE(sigma=1e-3, number=1)
    close(near(teacher, teacher), torch.full((6,), math.log(2), dtype=torch.float64), rtol=1e-3)
    with pytest.warns(UserWarning, match=r"log\(5\)"):
        none = PerturbationInfoNCE(sigma=0.0, number=4)
    close(none(teacher, teacher), torch.full((6,), math.log(5), dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        far = PerturbationInfoNCE(sigma=1.0, number=1)
    assert far(teacher, teacher).mean() < 0.3


@pytest.mark.chapter("A76", api=API + "BilinearSimilarity")
def test_bilinear_similarity_matches_golden_and_takes_two_widths(golden):
    case = golden("similarity_bilinear")
    a, b = case.inputs["a"], case.inputs["b"]
    similarity = BilinearSimilarity()
    similarity.build((1, len(a)), (1, len(b)))
    similarity.weight.data = case.inputs["W"]
    close(similarity(a[None], b[None])[0, 0].detach(), case.expected["sim"])
    torch.manual_seed(0)
    start = BilinearSimilarity()
    start.build((0, 200), (0, 300))
    assert start(features(50, 200), features(50, 300, seed=1)).detach().std() == pytest.approx(1.0, abs=0.1)


@pytest.mark.chapter("A76", api=API + "cosine_similarity")
def test_cosines_need_one_width():
    student, teacher = features(3, 4, seed=1), features(5, 4, seed=2)
    s, t = (side.numpy() / np.linalg.norm(side.numpy(), axis=1, keepdims=True) for side in (student, teacher))
    close(cosine_similarity(student, teacher), s @ t.T)
    with pytest.raises(ValueError, match=r"got 4 for the student and 3 for the teacher. Use `similarity='bilinear'`"):
        cosine_similarity(student, teacher[:, :3])


@pytest.mark.chapter("A73")
def test_samples_of_the_same_class_and_without_positions_are_no_negatives():
    student, teacher = features(5, 3, seed=1), features(5, 3, seed=2)
    labels = torch.tensor([0, 1, 0, -100, -100])
    values = InfoNCE(0.5)(student, teacher, labels=labels)
    logits = (cosine_similarity(student, teacher) / 0.5).numpy()
    for row, columns in enumerate([[0, 1, 3, 4], [0, 1, 2, 3, 4], [1, 2, 3, 4], range(5), range(5)]):
        close(values[row], logsumexp(logits[row, list(columns)]) - logits[row, row])
    mask = torch.ones(5, 2, dtype=torch.bool)
    mask[1] = False
    sequences = [side.unsqueeze(1).repeat(1, 2, 1) for side in (student, teacher)]
    kept = [0, 2, 3, 4]
    values = InfoNCE(0.5)(*sequences, mask)
    close(values[kept], InfoNCE(0.5)(student[kept], teacher[kept]))
    assert values[1] == 0


@pytest.mark.parametrize("include_positive", [True, False])
def test_gradients_are_those_of_finite_differences(include_positive):
    student, teacher = features(4, 3, seed=1).requires_grad_(), features(4, 3, seed=2).requires_grad_()
    excluded = torch.zeros(4, 4, dtype=torch.bool)
    excluded[1] = True  # a row without negatives
    excluded[2, 3] = True

    def values(s):
        similarity = cosine_similarity(s, teacher.detach())
        return info_nce(similarity, temperature=0.3, excluded=excluded, include_positive=include_positive)

    assert torch.autograd.gradcheck(values, student)
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        values(student).sum().backward()
    assert student.grad[1].abs().max() == 0
    assert values(student)[1] == 0


@pytest.mark.parametrize("make", [InfoNCE, PerturbationInfoNCE, TemporalInfoNCE])
@pytest.mark.parametrize("similarity", ["cosine", "bilinear"])
def test_edges_are_finite_and_only_the_student_and_the_similarity_learn(make, similarity):
    for kind in ("random", "one", "zero", "masked"):
        student, teacher = features(4, 3, 5, seed=1).bfloat16(), features(4, 3, 5, seed=2).bfloat16()
        if kind == "one":
            student, teacher = student[:1], teacher[:1]
        student = torch.zeros_like(student) if kind == "zero" else student
        mask = torch.zeros(student.shape[:2], dtype=torch.bool) if kind == "masked" else None
        distance = make(similarity=similarity)
        distance.build(student.shape, teacher.shape)
        student.requires_grad_()
        teacher.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = distance(student, teacher, mask)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        value.sum().backward()
        assert student.grad.isfinite().all()
        assert teacher.grad is None
        if kind == "random":
            assert student.grad.abs().sum() > 0
            assert all(p.grad.abs().sum() > 0 for p in distance.parameters())
            assert len(list(distance.parameters())) == (similarity == "bilinear")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InfoNCE(temperature=0.0), "`temperature` must be positive and finite, got 0.0"),
        (lambda: InfoNCE(similarity="dot"), "`similarity` must be 'cosine', 'bilinear' or a module, got 'dot'"),
        (lambda: TemporalInfoNCE(min_gap=0), "`min_gap` must be positive, got 0"),
        (lambda: PerturbationInfoNCE(number=0), "`number` must be positive, got 0"),
        (lambda: PerturbationInfoNCE(sigma=-1.0), "`sigma` must not be negative, got -1.0"),
        (lambda: ContrastiveMatching({}), "`pairs` must map taps of the student to taps of the teacher"),
        (lambda: TemporalInfoNCE()(features(3, 4), features(3, 4)), "Temporal negatives are positions"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def step(labels, **more):
    student = {"a": features(4, 6, seed=1).float().requires_grad_()}
    teacher = {"b": features(4, 6, seed=2).float()}
    return Step(
        None, Outputs(torch.zeros(4, 2), features=student), Outputs(torch.zeros(4, 2), features=teacher), labels, **more
    )


@pytest.mark.chapter("A73", api="lightning_distill.losses.ContrastiveMatching")
def test_term_leaves_the_same_class_out_and_the_distance_does_not():
    labels = torch.tensor([0, 0, 1, 2])
    term = ContrastiveMatching({"a": "b"}, temperature=0.5, similarity="cosine")
    now = step(labels)
    term.build(now)
    student, teacher = now.student.features["a"], now.teacher.features["b"]
    torch.testing.assert_close(term(now), InfoNCE(0.5)(student, teacher, labels=labels))
    plain = FeatureMatching({"a": "b"}, distance=InfoNCE(0.5), transform="identity")
    plain.build(now)
    torch.testing.assert_close(plain(now), InfoNCE(0.5)(student, teacher))
    assert (plain(now)[:2] > term(now)[:2]).all()
    torch.testing.assert_close(plain(now)[2:], term(now)[2:])
    term.pair_weights[0] = 0.0
    assert term(now).abs().max() == 0
    with pytest.raises(ValueError, match=r"one class per sample, or none, got shape \(4, 2\)"):
        term(step(torch.zeros(4, 2)))


@pytest.mark.chapter("A73", api=API + "InfoNCE")
def test_two_processes_with_unequal_batches_have_the_loss_and_gradients_of_one(tmp_path):
    port = str(20000 + os.getpid() % 20000)
    processes = [
        subprocess.Popen([sys.executable, SCRIPT, str(rank), port, tmp_path], stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for kind in ("cosine", "bilinear"):
        expected = loss_and_gradients(kind, *whole_batch())
        close(torch.cat([part[kind]["values"] for part in found]), expected["values"])
        for name in expected["gradients"]:
            total = sum(part[kind]["gradients"][name] for part in found)
            close(total, expected["gradients"][name])
