"""Divergence from a teacher of another task."""

import math

import pytest
import torch
from torch import nn

from lightning_distill import KD
from lightning_distill.losses import kl_divergence
from lightning_distill.losses.cross_task import CrossTaskTargets, cross_task_kd
from lightning_distill.outputs import Outputs, Step

MAPPING = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)


def logits(*shape, seed=0):
    return 2 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.chapter("B26", api="lightning_distill.losses.CrossTaskTargets")
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_matches_the_definition(temperature):
    from scipy.special import rel_entr, softmax

    student, teacher = logits(5, 3, seed=1), logits(5, 4, seed=2)
    target = softmax(teacher.numpy() / temperature, axis=-1) @ MAPPING.numpy()
    expected = temperature**2 * rel_entr(target, softmax(student.numpy() / temperature, axis=-1)).sum(-1)
    step = Step(None, Outputs(student), Outputs(teacher), temperature=temperature)
    torch.testing.assert_close(CrossTaskTargets(MAPPING)(step), torch.from_numpy(expected))
    unscaled = cross_task_kd(student, teacher, MAPPING, temperature=temperature, scale_by_t2=False)
    torch.testing.assert_close(unscaled, torch.from_numpy(expected) / temperature**2)


@pytest.mark.chapter("B26")
def test_the_unit_matrix_gives_the_plain_divergence():
    student, teacher = logits(2, 5, 4, seed=1), logits(2, 5, 4, seed=2)
    temperature = torch.tensor([[1.0], [3.0]]).expand(2, 5)
    value = cross_task_kd(student, teacher, torch.eye(4), temperature=temperature)
    torch.testing.assert_close(value, kl_divergence(student, teacher, temperature=temperature))


def test_zero_where_the_student_says_what_the_mapping_makes_of_the_teacher():
    teacher = logits(5, 4, seed=2)
    student = (teacher.softmax(-1) @ MAPPING).log().requires_grad_()
    value = cross_task_kd(student, teacher.requires_grad_(), MAPPING)
    value.sum().backward()
    assert value.abs().max() < 1e-12
    assert student.grad.abs().max() < 1e-12
    assert teacher.grad is None


@pytest.mark.parametrize("temperature", [0.01, 1.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_at_the_ends_and_wide(dtype, temperature):
    big = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4]]).to(dtype).requires_grad_()
    mapping = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    for teacher in (big.roll(1, -1), torch.zeros(2, 3)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = cross_task_kd(big, teacher, mapping, temperature=temperature)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        torch.testing.assert_close(value, kl_divergence(big, teacher, temperature=temperature), rtol=1e-5, atol=1e-3)
        value.sum().backward()


def test_trains_a_student_of_other_classes(make_trainer):
    """The teacher knows four classes, the student learns three of its own without a single label."""
    x = torch.randn(64, 4)
    teacher = nn.Linear(4, 4)
    module = KD(
        nn.Linear(4, 3), teacher, temperature=1.0, alpha=0.0, terms={"soft": CrossTaskTargets(MAPPING.float())},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05),
    )  # fmt: skip
    wanted = teacher(x).softmax(-1) @ MAPPING.float()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=16)
    before = (module.student(x).softmax(-1) - wanted).abs().mean().item()
    make_trainer(max_epochs=20).fit(module, loader)
    after = (module.student(x).softmax(-1) - wanted).abs().mean().item()
    assert after < before / 3
    assert not any("mapping" in name for name in module.state_dict())


def test_errors():
    with pytest.raises(ValueError, match=r"shape \(4, 3\), got \(3, 4\)"):
        cross_task_kd(logits(5, 3), logits(5, 4), MAPPING.T)
    with pytest.raises(ValueError, match=r"items of shape \(5,\), the teacher's \(2,\); both must see the same batch"):
        cross_task_kd(logits(5, 3), logits(2, 4), MAPPING)
    with pytest.raises(ValueError, match="`temperature` must be positive and finite, got nan"):
        cross_task_kd(logits(5, 3), logits(5, 4), MAPPING, temperature=math.nan)
    with pytest.raises(ValueError, match=r"`mapping` must be a matrix, .* got 1 dimensions"):
        CrossTaskTargets([0.5, 0.5])
    with pytest.raises(ValueError, match=r"row 1 is \[0.5, 0.25\], which sums to 0.75"):
        CrossTaskTargets([[0.0, 1.0], [0.5, 0.25]])
    with pytest.raises(ValueError, match=r"row 0 is .*, which sums to 1"):
        CrossTaskTargets([[2.0, -1.0]])
    with pytest.raises(ValueError, match=r"row 0 is .*, which sums to nan"):
        CrossTaskTargets([[math.nan, 1.0]])
