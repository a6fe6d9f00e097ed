"""Terms on the student's features alone."""

import numpy as np
import pytest
import torch

from lightning_distill.losses import ActivationSparsity, Decorrelation, LipschitzPenalty
from lightning_distill.losses.regularizers import (
    activation_sparsity,
    decorrelation,
    lipschitz_penalty,
    lipschitz_slopes,
)
from lightning_distill.outputs import Outputs, Step

API = "lightning_distill.losses.regularizers."


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(value, expected):
    value, expected = (torch.as_tensor(side, dtype=torch.float64) for side in (value, expected))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


def step(logits=None, positions=None, **taps):
    logits = torch.zeros(len(next(iter(taps.values()))), 2) if logits is None else logits
    return Step(None, Outputs(logits, features=taps), positions=positions)


@pytest.mark.chapter("A62", api=API + "decorrelation")
def test_decorrelation_is_the_mean_square_off_the_diagonal():
    values = features(9, 4)
    correlation = np.corrcoef(values.numpy().T)
    close(decorrelation(values), (correlation**2)[~np.eye(4, dtype=bool)].mean())
    close(decorrelation(values[:, :1].repeat(1, 3)), 1.0)
    close(decorrelation(torch.linalg.qr(values - values.mean(0)).Q), 0.0)
    assert decorrelation(values[:, :1]) == 0
    assert torch.autograd.gradcheck(decorrelation, values.requires_grad_())


@pytest.mark.chapter("A63", api=API + "activation_sparsity")
def test_sparsity_matches_golden(golden):
    case = golden("activation_sparsity")
    values, weight = case.inputs["F_S"], case.inputs["weight"]
    close(weight * activation_sparsity(values).mean(), case.expected["mean"])
    close(weight * activation_sparsity(values).sum() * values.shape[-1], case.expected["sum"])
    assert activation_sparsity(-values.abs()).abs().max() == 0


@pytest.mark.chapter("A64", api=API + "lipschitz_penalty")
def test_slopes_match_golden_and_stay_below_the_constant(golden):
    case = golden("lipschitz_regulariser")
    x, y = case.inputs["x"], case.inputs["fx"]
    close(lipschitz_penalty(x, y), case.expected["mean"])
    close(lipschitz_penalty(x, y, reduction="max"), case.expected["max"])
    assert case.expected["mean"] < lipschitz_penalty(x, y, reduction="softmax") < case.expected["max"]
    assert lipschitz_penalty(x, y, reduction="max") <= case.expected["true_lipschitz"]
    ring = lipschitz_slopes(x, y, pairs="neighbours")
    close(ring, (y.roll(1, 0) - y).norm(dim=1) / (x.roll(1, 0) - x).norm(dim=1))
    matrix = features(3, 5)
    inputs = features(20, 5, seed=1)
    assert lipschitz_penalty(inputs, inputs @ matrix.T, reduction="max") <= torch.linalg.matrix_norm(matrix, 2)


@pytest.mark.chapter("A64")
def test_equal_samples_have_no_slope_and_a_finite_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    for y in (torch.ones(4, 2, requires_grad=True), features(4, 2).float().requires_grad_()):
        for reduction in ("mean", "max", "softmax"):
            value = lipschitz_penalty(x, y, reduction=reduction)
            value.backward()
            assert value == 0
            assert x.grad.isfinite().all()
            assert y.grad.isfinite().all()
    assert lipschitz_penalty(x[:1], x[:1]) == 0
    inputs, outputs = features(4, 3), features(4, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: lipschitz_penalty(inputs, o), outputs)
    assert lipschitz_penalty(inputs.bfloat16(), outputs.bfloat16()).dtype == torch.float32


def test_terms_read_taps_and_positions():
    maps = features(3, 4, 5, 5).float()
    sequences = features(3, 6, 4, seed=1).float()
    positions = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    now = step(positions=positions, a=maps, b=sequences, c=maps)
    sparse = ActivationSparsity(["a", "b"])(now)
    means = [
        maps.relu().mean((1, 2, 3)),
        torch.stack([s[p].relu().mean() for s, p in zip(sequences, positions, strict=True)]),
    ]
    torch.testing.assert_close(sparse, torch.stack(means).mean(0))
    torch.testing.assert_close(Decorrelation(["b"])(now), decorrelation(sequences[positions]))
    torch.testing.assert_close(
        Decorrelation(["a"], channel_dim=1)(now), decorrelation(maps.movedim(1, -1).flatten(0, 2))
    )
    pooled = torch.stack([s[p].mean(0) for s, p in zip(sequences, positions, strict=True)])
    torch.testing.assert_close(LipschitzPenalty("b", "a")(now), lipschitz_penalty(pooled, maps))
    logits = features(3, 2, seed=2).float()
    term = LipschitzPenalty("a", reduction="max")
    assert term.student_taps == ("a",)
    torch.testing.assert_close(term(step(logits, a=maps)), lipschitz_penalty(maps, logits, reduction="max"))
    assert not any(kind.needs_teacher for kind in (Decorrelation, ActivationSparsity, LipschitzPenalty))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Decorrelation([]), r"`taps` must be a list of names .*, at least one, got \[\]"),
        (lambda: ActivationSparsity("a"), "`taps` must be a list of names .*, got 'a'"),
        (lambda: LipschitzPenalty("a", pairs="some"), "`pairs` must be 'all' or 'neighbours', got 'some'"),
        (lambda: LipschitzPenalty("a", reduction="sum"), "`reduction` must be 'mean', 'max' or 'softmax', got 'sum'"),
        (lambda: lipschitz_slopes(features(2, 1), features(3, 1)), "of the same samples, got 2 and 3"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
