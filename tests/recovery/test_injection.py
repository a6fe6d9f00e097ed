"""Injected features, against closed forms and autograd."""

import math

import pytest
import torch
from torch import nn

from lightning_distill.recovery import FeatureInjector, adaptive_alpha, feature_injection

API = "lightning_distill.recovery."


@pytest.mark.chapter("D22", api=API + "feature_injection")
def test_injection_is_the_golden_one(golden):
    case = golden("feature_injection")
    found = feature_injection(case.inputs["h_quant"], case.inputs["h_teacher"], case.inputs["alpha"])
    torch.testing.assert_close(found, case.expected["h"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("D22")
def test_the_teachers_features_get_no_gradient_and_the_students_a_smaller_one():
    hidden = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    assert torch.equal(feature_injection(hidden, teacher, 0.0), hidden)
    torch.testing.assert_close(feature_injection(hidden, teacher, 1.0), teacher)
    gradient = torch.randn(3, 4)
    feature_injection(hidden, teacher, 0.3).backward(gradient)
    torch.testing.assert_close(hidden.grad, 0.7 * gradient)
    assert teacher.grad is None
    assert feature_injection(hidden.bfloat16(), teacher, 0.5).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"`alpha`, the teacher's share, must be in \[0, 1\], got 1.5"):
        feature_injection(hidden, teacher, 1.5)
    with pytest.raises(ValueError, match=r"must have the same shape, got \(3, 4\) and \(3, 5\)"):
        feature_injection(hidden, torch.randn(3, 5), 0.5)


@pytest.mark.chapter("D23", api=API + "adaptive_alpha")
def test_adaptive_share_is_the_golden_one(golden):
    case = golden("adaptive_injection_alpha")
    ours, theirs = case.inputs["h_quant"][None], case.inputs["h_teacher"][None]
    assert adaptive_alpha(ours, theirs).item() == pytest.approx(case.expected["alpha"], rel=case.rtol)
    error = ((theirs - ours).norm() / theirs.norm()).item()
    assert error == pytest.approx(case.expected["relative_error"], rel=case.rtol)


@pytest.mark.erratum("ERR-61")
@pytest.mark.chapter("D23")
def test_printed_share_is_never_below_one_half(golden):
    case = golden("adaptive_injection_alpha")
    printed = torch.sigmoid(torch.tensor([0.0, case.expected["relative_error"], 10.0], dtype=torch.float64))
    assert printed[0].item() == case.expected["alpha_as_written_at_zero_error"] == 0.5
    assert printed[1].item() == pytest.approx(case.expected["alpha_as_written"], rel=case.rtol)
    assert bool((printed >= 0.5).all())
    hidden = torch.randn(2, 3)
    assert adaptive_alpha(hidden, hidden).flatten().tolist() == [0.0, 0.0]


def test_adaptive_share_is_one_per_sample_and_finite():
    theirs = torch.randn(2, 3, 4)
    ours = torch.stack([theirs[0], theirs[1] * 2])
    share = adaptive_alpha(ours.bfloat16(), theirs)
    assert share.shape == (2, 1, 1)
    assert share.dtype == torch.float32
    assert share[1].item() == pytest.approx(math.tanh(0.5), rel=0.02)
    zero = adaptive_alpha(torch.ones(1, 3), torch.zeros(1, 3))
    assert zero.item() == pytest.approx(1.0)
    assert not share.requires_grad


def networks():
    torch.manual_seed(3)
    make = lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))  # noqa: E731
    return make(), make()


def test_injector_blends_the_pass_that_follows_the_teachers_and_no_other():
    student, teacher = networks()
    x = torch.randn(6, 4)
    plain, theirs = student(x), teacher[0](x)
    injector = FeatureInjector(student, teacher, {"0": "0"})
    teacher(x)
    assert torch.equal(student(x), plain)  # alpha is 0
    injector.alpha = 0.25
    assert torch.equal(student(x), plain)  # the teacher did not run since
    teacher(x)
    expected = student[2](
        torch.relu(torch.lerp(nn.functional.linear(x, student[0].weight, student[0].bias), theirs, 0.25))
    )
    torch.testing.assert_close(student(x), expected)
    assert torch.equal(student(x), plain)
    injector.adaptive = True
    teacher(x)
    hidden = nn.functional.linear(x, student[0].weight, student[0].bias)
    share = 0.25 * adaptive_alpha(hidden, theirs)
    torch.testing.assert_close(student(x), student[2](torch.relu(feature_injection(hidden, theirs, share))))
    teacher(x)
    injector.remove()
    assert torch.equal(student(x), plain)
    assert not student[0]._forward_hooks
    assert not teacher[0]._forward_hooks


def test_injector_refuses_what_does_not_fit():
    student, teacher = networks()
    with pytest.raises(ValueError, match="The student has no submodule 'body'"):
        FeatureInjector(student, teacher, {"body": "0"})
    with pytest.raises(ValueError, match="The teacher has no submodule '9'"):
        FeatureInjector(student, teacher, {"0": "9"})
    with pytest.raises(ValueError, match="names no layer"):
        FeatureInjector(student, teacher, {})
    injector = FeatureInjector(student, teacher, {"0": "2"})
    injector.alpha = 1.0
    teacher(torch.randn(2, 4))
    with pytest.raises(ValueError, match=r"features of '0' have shape \(2, 5\), the teacher's \(2, 3\)"):
        student(torch.randn(2, 4))
