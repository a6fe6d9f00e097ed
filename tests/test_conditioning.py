"""Curvature: golden spectra, Lanczos against the whole matrix, and the chapter's claims."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_distill.diagnostics import (
    compare_conditioning,
    condition_number,
    ggn_spectrum,
    hessian,
    hessian_spectrum,
    lanczos,
)

API = "lightning_distill.diagnostics."


class Logits(nn.Module):
    """A network whose parameters are its logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits.expand(len(x), -1)


def linear(weight):
    network = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    network.weight.data = weight.clone()
    return network


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def kl(student, teacher, tau):
    return F.kl_div(
        F.log_softmax(student / tau, -1), F.log_softmax(teacher / tau, -1), log_target=True, reduction="batchmean"
    )


@pytest.mark.chapter("A61", api=API + "ggn_spectrum")
def test_spectrum_of_the_softmax_is_golden(golden):
    case = golden("softmax_hessian_spectrum")
    network, x = Logits(case.inputs["logits"]), torch.zeros(1, 1)
    for place, tau in enumerate(case.inputs["tau"].tolist()):
        eigenvalues = ggn_spectrum(network, x, temperature=tau)
        expected = case.expected["eigenvalues"][place]
        torch.testing.assert_close(eigenvalues * tau**2, expected, rtol=case.rtol, atol=case.atol)
        assert eigenvalues[-1].item() == pytest.approx(case.expected["lambda_max_of_KL"][place].item(), rel=1e-8)
        found = condition_number(eigenvalues)
        assert found == pytest.approx(case.expected["condition_number"][place].item(), rel=1e-6)
        assert eigenvalues[0].abs() < 1e-12  # shifting all logits changes nothing


@pytest.mark.chapter("A61", api=API + "hessian")
def test_hessian_of_a_linear_model_is_golden(golden):
    case = golden("kd_hessian_linear_model")
    network, x, tau = linear(case.inputs["W"]), case.inputs["x"][None], case.inputs["tau"]
    teacher = double([[0.3, -1.0, 2.0]])
    found = hessian(lambda: kl(network(x), teacher, tau), [network.weight])
    torch.testing.assert_close(found, case.expected["hessian"], rtol=case.rtol, atol=case.atol)
    # the Gauss-Newton part is all of it
    torch.testing.assert_close(
        torch.linalg.eigvalsh(found)[-3:], ggn_spectrum(network, x, temperature=tau), rtol=1e-7, atol=1e-12
    )


X = [[1, 0.2], [-0.5, 1], [0.3, -1.2], [2, 0.5], [-1, -1], [0.1, 0.8]]
W = [[3.0, 0], [-1, 2.5], [-2, -2]]


@pytest.mark.chapter("A61", api=API + "compare_conditioning")
def test_distillation_is_better_conditioned_at_a_confident_student_and_equally_at_an_undecided_one():
    confident = compare_conditioning(linear(double(W)), double(X), temperature=4.0)
    # computed with NumPy from the closed form (diag p - p p^T) x x^T
    assert confident.cross_entropy[-4:].tolist() == pytest.approx([0.003614, 0.013421, 0.0340215, 0.116304], rel=1e-4)
    assert confident.distillation[-4:].tolist() == pytest.approx([0.134204, 0.169311, 0.225093, 0.298473], rel=1e-5)
    assert confident.conditions == pytest.approx((32.1816, 2.22402), rel=1e-5)
    assert confident.ratio == pytest.approx(32.1816 / 2.22402, rel=1e-5)
    undecided = compare_conditioning(linear(torch.zeros(3, 2, dtype=torch.float64)), double(X), temperature=4.0)
    assert undecided.ratio == pytest.approx(1.0)


@pytest.mark.erratum("ERR-24")
def test_printed_hessian_takes_the_wrong_probabilities_and_its_largest_eigenvalue(golden):
    case = golden("kd_hessian_linear_model")
    network, x, tau = linear(case.inputs["W"]), case.inputs["x"][None], case.inputs["tau"]
    teacher = double([[0.3, -1.0, 2.0]])
    exact = hessian(lambda: kl(network(x), teacher, tau), [network.weight])

    def by(p):
        return torch.kron(torch.diag(p) - torch.outer(p, p), torch.outer(x[0], x[0])) / tau**2

    student_p, teacher_p = ((logits / tau).softmax(-1)[0] for logits in (network(x).detach(), teacher))
    assert (by(student_p) - exact).abs().max() < 1e-12
    assert (by(teacher_p) - exact).abs().max() > 0.01  # printed: the teacher's probabilities
    assert exact.abs().max() > 0.1  # printed: times the second derivative of the logits, 0 for a linear model
    spectrum = golden("softmax_hessian_spectrum")
    logits, tau = spectrum.inputs["logits"], 10.0
    largest = ggn_spectrum(Logits(logits), torch.zeros(1, 1), temperature=tau)[-1].item()
    assert largest == pytest.approx(0.00366, rel=1e-2)  # printed: 1 / tau^2 = 0.01
    assert largest == pytest.approx(1 / (3 * tau**2), rel=0.15)
    # "much smaller condition number" depends on the point: equal where all logits are
    assert compare_conditioning(
        linear(torch.zeros(3, 2, dtype=torch.float64)), double(X), temperature=tau
    ).ratio == pytest.approx(1)


@pytest.mark.chapter("A61", api=API + "hessian_spectrum")
def test_lanczos_finds_the_largest_of_the_whole_spectrum():
    network = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 4, (20,))
    parameters = list(network.parameters())

    def loss():
        return F.cross_entropy(network(x), y)

    whole = hessian_spectrum(loss, parameters)
    assert len(whole) == sum(p.numel() for p in parameters)
    matrix = torch.autograd.functional.hessian(  # another way to the same matrix
        lambda bias: F.cross_entropy(F.linear(network[:2](x), network[2].weight, bias), y), network[2].bias
    )
    torch.testing.assert_close(hessian(loss, parameters)[-4:, -4:], matrix)
    largest = hessian_spectrum(loss, parameters, k=4, steps=30)
    torch.testing.assert_close(largest, whole[-4:], rtol=1e-6, atol=0)
    assert all(p.grad is None for p in parameters)


def test_lanczos_stops_where_the_directions_are_closed():
    matrix = torch.diag(double([1.0, 1.0, 1.0, 5.0, 5.0]))
    values = lanczos(lambda v: matrix @ v, 5, steps=5)
    torch.testing.assert_close(values, double([1.0, 5.0]))  # each eigenvalue once


def test_gauss_newton_is_positive_and_leaves_no_trace_in_the_network():
    network = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4), nn.Dropout())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    spectrum = ggn_spectrum(network, torch.randn(30, 3), temperature=2.0)
    assert len(spectrum) == sum(p.numel() for p in network.parameters())
    assert (spectrum > -1e-9).all()
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    bias_alone = ggn_spectrum(network, torch.randn(30, 3), parameters=[network[3].bias])
    assert bias_alone[0].abs() < 1e-9  # the shift of all logits
    assert bias_alone[1] > 1e-3


def test_bad_input():
    network = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got 0"):
        compare_conditioning(network, torch.zeros(1, 2), temperature=0.0)
    with pytest.raises(ValueError, match="There are no parameters with `requires_grad`"):
        ggn_spectrum(nn.Identity(), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="There is no positive eigenvalue"):
        condition_number(torch.zeros(3))
    large = nn.Linear(50, 50)
    with pytest.raises(ValueError, match="A Hessian of 2550 parameters does not fit; the limit is 2000"):
        hessian_spectrum(lambda: large(torch.ones(50)).sum(), list(large.parameters()))
    with pytest.raises(ValueError, match="`k` must be between 1 and the smaller of `steps`, 5, and 2550 parameters"):
        hessian_spectrum(lambda: large(torch.ones(50)).sum(), list(large.parameters()), k=6, steps=5)
    assert hessian_spectrum(lambda: network(torch.ones(2)).sum(), list(network.parameters())).abs().max() == 0
