"""Output corrections: nothing at first, exact where the error is affine."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import KD
from lightning_distill.modes import inference
from lightning_distill.recovery import (
    AttentionCorrector,
    LinearCorrector,
    OutputCalibrator,
    ResidualCorrector,
    fit_linear_corrector,
    linear_correction,
)

API = "lightning_distill.recovery."


@pytest.mark.chapter("D29", api=API + "linear_correction")
def test_linear_correction_is_the_golden_one(golden):
    case = golden("linear_output_calibration")
    x, y, wanted = case.inputs["x"], case.inputs["y_quant"], case.inputs["y_true"]
    weight, bias = linear_correction(x, y, wanted)
    torch.testing.assert_close(bias, case.expected["b_c"], rtol=case.rtol, atol=1e-9)
    torch.testing.assert_close(weight, case.expected["W_c"], rtol=case.rtol, atol=1e-9)
    residual = y + torch.cat([x, y], dim=1) @ weight.T + bias - wanted
    assert residual.abs().max().item() == pytest.approx(case.expected["residual"], abs=1e-9)


def test_ridge_is_the_minimum_of_its_objective():
    generator = torch.Generator().manual_seed(0)
    x, y, target = (torch.randn(30, n, dtype=torch.float64, generator=generator) for n in (4, 3, 3))
    weight, bias = linear_correction(x, y, target, ridge=0.3)

    def objective(w, b):
        return (y + torch.cat([x, y], dim=1) @ w.T + b - target).square().sum() + 30 * 0.3 * w.square().sum()

    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    for gradient in torch.autograd.grad(objective(weight, bias), (weight, bias)):
        np.testing.assert_allclose(gradient.numpy(), 0, atol=1e-9)
    small, _ = linear_correction(x, y, target, ridge=1e6)
    assert small.abs().max() < 1e-5
    constant = torch.cat([x, torch.zeros(30, 2)], dim=1)  # a column that says nothing
    shortest, _ = linear_correction(constant, y, target)
    assert shortest[:, 4:6].abs().max() < 1e-10
    with pytest.raises(ValueError, match="`ridge` must be finite and not negative, got -1"):
        linear_correction(x, y, target, ridge=-1)
    with pytest.raises(ValueError, match=r"got \(29, 4\), \(30, 3\) and \(30, 3\)"):
        linear_correction(x[1:], y, target)


CORRECTORS = [
    LinearCorrector(12, 3),
    LinearCorrector(0, 3),
    ResidualCorrector(12, 3, hidden=8),
    ResidualCorrector(0, 3),
    AttentionCorrector(2, 6, 3, width=8),
    AttentionCorrector(6, 2, 3, width=8, channels_last=True),
]


@pytest.mark.chapter("D28", api=API + "OutputCalibrator")
@pytest.mark.chapter("D29", api=API + "AttentionCorrector")
@pytest.mark.parametrize("corrector", CORRECTORS, ids=lambda c: type(c).__name__)
def test_a_fresh_corrector_corrects_nothing_and_learns_while_the_network_stays(corrector, make_trainer):
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Dropout(0.5))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    calibrator = OutputCalibrator(network, corrector)
    x, y = torch.randn(64, 2, 6), torch.randint(3, (64,))
    with inference(network):
        assert torch.equal(calibrator(x), network(x))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    module = KD(calibrator, teacher, alpha=0.0, temperature=1.0, optimizer=lambda p: torch.optim.Adam(p, lr=0.05))
    loader = DataLoader(TensorDataset(x, y), batch_size=32)

    def distance():
        with torch.no_grad():
            return nn.functional.kl_div(
                calibrator(x).log_softmax(1), teacher(x).log_softmax(1), reduction="batchmean", log_target=True
            )

    first = distance()
    L.seed_everything(0, verbose=False)
    make_trainer(max_epochs=15).fit(module, loader)
    assert distance() < 0.7 * first
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_solving_recovers_an_affine_error_exactly():
    torch.manual_seed(0)
    teacher = nn.Linear(5, 3)
    network = nn.Linear(5, 3)
    calibrator = OutputCalibrator(network, LinearCorrector(5, 3))
    batches = [(torch.randn(20, 5), None) for _ in range(3)]
    fit_linear_corrector(calibrator, batches, teacher, ridge=0.0)
    x = torch.randn(9, 5)
    torch.testing.assert_close(calibrator(x), teacher(x), rtol=1e-4, atol=1e-4)
    assert teacher.training
    with pytest.raises(TypeError, match="Only a `LinearCorrector` can be solved for"):
        fit_linear_corrector(OutputCalibrator(network, ResidualCorrector(5, 3)), batches, teacher)
    with pytest.raises(ValueError, match="`batches` is empty"):
        fit_linear_corrector(calibrator, [], teacher)
    with pytest.raises(ValueError, match="built for 4 inputs per sample, got 5"):
        fit_linear_corrector(OutputCalibrator(network, LinearCorrector(4, 3)), batches, teacher)


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="`outputs` positive, got 3 and 0"):
        LinearCorrector(3, 0)
    with pytest.raises(ValueError, match="got 3, 2 and 0"):
        ResidualCorrector(3, 2, hidden=0)
    with pytest.raises(ValueError, match="`width` must be a multiple of `heads`, got 7 and 2"):
        AttentionCorrector(2, 6, 3, width=7)
    with pytest.raises(ValueError, match="`positions` must be positive, got 0"):
        AttentionCorrector(2, 0, 3)
