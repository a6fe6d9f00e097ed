"""Injected gradients, against the formulas on the gradients themselves."""

import pytest
import torch

from lightning_distill.weighting import (
    InjectionWeights,
    align_direction,
    align_projection,
    beta_decay,
    injection_weights,
)

API = "lightning_distill.weighting."


@pytest.mark.chapter("D24", api=API + "injection_weights")
def test_plain_injection_is_the_golden_one(golden):
    case = golden("gradient_injection")
    rows = torch.stack([case.inputs["g_student"], case.inputs["g_teacher"]])
    weights = injection_weights(rows @ rows.T, beta=case.inputs["beta"], alignment="none")
    torch.testing.assert_close(
        torch.tensor(weights).double() @ rows, case.expected["g"], rtol=case.rtol, atol=case.atol
    )


@pytest.mark.chapter("D25", api=API + "align_direction")
@pytest.mark.chapter("D26", api=API + "align_projection")
def test_alignments_are_the_golden_ones(golden):
    case = golden("gradient_alignment")
    ours, theirs, lam = case.inputs["g_student"], case.inputs["g_teacher"], case.inputs["lam"]
    close = {"rtol": case.rtol, "atol": case.atol}
    torch.testing.assert_close(align_direction(ours, theirs), case.expected["direction"], **close)
    torch.testing.assert_close(align_projection(ours, theirs), case.expected["projection"], **close)
    aligned = ours + lam * align_projection(ours, theirs)
    torch.testing.assert_close(aligned, case.expected["aligned"], **close)
    assert (aligned @ ours).item() == pytest.approx(case.expected["inner_with_gs"], rel=case.rtol)


@pytest.mark.parametrize("alignment", ["none", "direction", "projection"])
def test_weights_from_inner_products_give_the_aligned_gradient(alignment):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        ours, theirs = torch.randn(2, 6, generator=generator, dtype=torch.float64)
        rows = torch.stack([ours, theirs])
        aligned = {
            "none": theirs,
            "direction": align_direction(ours, theirs),
            "projection": align_projection(ours, theirs),
        }
        found = torch.tensor(injection_weights(rows @ rows.T, beta=0.7, alignment=alignment)).double() @ rows
        torch.testing.assert_close(found, ours + 0.7 * aligned[alignment], rtol=1e-6, atol=1e-7)


@pytest.mark.chapter("D26")
def test_projection_keeps_the_descent_of_the_students_own_loss_and_direction_its_length():
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        ours, theirs = torch.randn(2, 4, generator=generator, dtype=torch.float64)
        square = (ours @ ours).item()
        for share in (0.0, 0.5, 10.0):
            assert ((ours + share * align_projection(ours, theirs)) @ ours).item() == pytest.approx(square)
        assert align_direction(ours, theirs).norm().item() == pytest.approx(square**0.5)


@pytest.mark.erratum("ERR-62")
@pytest.mark.chapter("D25")
def test_the_teachers_direction_alone_raises_the_students_loss_where_the_two_disagree():
    ours, theirs = torch.tensor([3.0, 4.0]), torch.tensor([-1.0, 0.0])
    assert (align_direction(ours, theirs) @ ours).item() == -15.0  # a step against it goes up
    assert (align_projection(ours, theirs) @ ours).item() == pytest.approx(0.0, abs=1e-6)
    assert ((ours + align_projection(ours, theirs)) @ ours).item() == pytest.approx(25.0)


def test_gradients_of_length_zero_and_low_precision():
    zero, some = torch.zeros(3), torch.tensor([1.0, 2.0, -1.0])
    assert align_direction(some, zero).tolist() == [0.0] * 3
    assert align_direction(zero, some).tolist() == [0.0] * 3
    assert torch.equal(align_projection(zero, some), some)
    assert injection_weights(torch.zeros(2, 2), beta=0.5, alignment="direction") == (1.0, 0.0)
    assert injection_weights(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), beta=0.5) == (1.0, 0.5)
    assert align_projection(some.bfloat16(), some.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"must have the same shape, got \(3,\) and \(2,\)"):
        align_direction(zero, some[:2])


@pytest.mark.chapter("D27", api=API + "beta_decay")
def test_decay_is_the_golden_one(golden):
    case = golden("beta_decay")
    beta, gamma = case.inputs["beta0"], case.inputs["gamma"]
    found = [beta_decay(t, beta=beta, gamma=gamma) for t in case.inputs["t_over_T"].tolist()]
    assert found == pytest.approx(case.expected["beta"].tolist(), rel=case.rtol)
    assert found == sorted(found, reverse=True)
    with pytest.raises(ValueError, match=r"`progress` must be in \[0, 1\], got 1.1"):
        beta_decay(1.1, beta=1.0, gamma=1.0)
    with pytest.raises(ValueError, match="`gamma` must be finite and not negative, got -1"):
        beta_decay(0.5, beta=1.0, gamma=-1)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`beta` must be finite and not negative, got -0\.5"):
        InjectionWeights(beta=-0.5)
    with pytest.raises(ValueError, match="`alignment` must be one of"):
        InjectionWeights(alignment="both")
    with pytest.raises(ValueError, match=r"`gram` must have the shape \(2, 2\), got \(3, 3\)"):
        injection_weights(torch.eye(3), beta=1.0)
    with pytest.raises(ValueError, match="the term 'soft', which the module does not have"):
        InjectionWeights().bind(["hard", "kd"], torch.nn.Linear(1, 1))
