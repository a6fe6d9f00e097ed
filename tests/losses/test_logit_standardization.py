"""Standardized logits against z-scores in SciPy."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from scipy.stats import zscore

from lightning_distill.losses import DKD, LogitStandardization, SoftTargets, Term, standardize_logits
from lightning_distill.outputs import Outputs, Step


def logits(seed, *shape):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 5


def test_logits_become_z_scores():
    values = logits(0, 2, 3, 7)
    np.testing.assert_allclose(standardize_logits(values), zscore(values.numpy(), axis=-1), rtol=1e-6, atol=1e-6)
    assert standardize_logits(values.bfloat16()).dtype == torch.float32


def test_matches_the_paper():
    """Sun et al. (2024), algorithm 2: the divergence of the softened z-scores, times the squared base temperature."""
    student, teacher = logits(1, 6, 5), logits(2, 6, 5)
    q, p = (softmax(zscore(z.numpy(), axis=-1) / 2.0, axis=-1) for z in (student, teacher))
    step = Step(None, Outputs(student), Outputs(teacher), temperature=2.0)
    np.testing.assert_allclose(LogitStandardization()(step), 4 * rel_entr(p, q).sum(-1), rtol=1e-5)


def test_neither_scale_nor_shift_of_either_side_matters():
    student, teacher = logits(1, 6, 5), logits(2, 6, 5)
    scale, shift = torch.rand(6, 1).double() + 0.5, torch.randn(6, 1).double()
    term = LogitStandardization(SoftTargets(beta=0.5))
    one = term(Step(None, Outputs(student), Outputs(teacher), temperature=2.0))
    other = term(Step(None, Outputs(scale * student + shift), Outputs(teacher / scale - shift), temperature=2.0))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert one.min() > 0.01


def test_wraps_any_term_and_leaves_the_step_alone():
    student, teacher, labels = logits(1, 6, 5), logits(2, 6, 5), torch.arange(6) % 5
    step = Step(None, Outputs(student, features={"a": student}), Outputs(teacher), labels=labels, temperature=2.0)
    by_hand = Step(
        None, Outputs(standardize_logits(student)), Outputs(standardize_logits(teacher)), labels=labels, temperature=2.0
    )
    torch.testing.assert_close(LogitStandardization(DKD())(step), DKD()(by_hand))
    assert torch.equal(step.student.logits, student)
    assert torch.equal(step.teacher.logits, teacher)


def test_the_wrapped_term_still_gets_what_it_taps():
    class Tapping(Term):
        student_taps = ("a",)
        teacher_taps = ("b",)

        def forward(self, step):
            return step.student.features["a"] - step.teacher.features["b"]

    term = LogitStandardization(Tapping())
    student = Outputs(torch.zeros(2, 3), features={"a": torch.tensor([3.0, 4.0])})
    teacher = Outputs(torch.zeros(2, 3), features={"b": torch.tensor([1.0, 1.0])})
    assert (term.student_taps, term.teacher_taps) == (("a",), ("b",))
    assert term(Step(None, student, teacher)).tolist() == [2.0, 3.0]


def test_refuses_what_is_no_term():
    with pytest.raises(TypeError, match=r"`term` must be a loss term such as `SoftTargets\(\)`, got type"):
        LogitStandardization(SoftTargets)
