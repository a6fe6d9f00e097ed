"""Inputs are recognised through casts and padding, and told from others."""

import pytest
import torch

from lightning_distill.teachers.cache import input_signature, same_input


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 2), (64, 1, 40), (16, 3, 64, 64)], ids=str)
def test_a_cast_does_not_change_an_input(shape, dtype):
    inputs = torch.randn(shape)
    assert same_input(input_signature(inputs), input_signature(inputs.to(dtype))).all()


def test_autocast_does_not_change_an_input():
    inputs = 100 * torch.rand(16, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = input_signature(inputs)
    assert same_input(input_signature(inputs), inside).all()


def images():
    """Smooth, as photographs are."""
    rough = torch.randn(64, 3, 8, 8)
    return torch.nn.functional.interpolate(rough, size=(64, 64), mode="bilinear")


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.roll(1, 0),
        lambda x: x.flip(-1),
        lambda x: x.roll(4, -1),
        lambda x: 1.05 * x,
        lambda x: 0.9 * x + 0.1 * x.roll(1, 0),
        lambda x: x.transpose(-1, -2),
    ],
    ids=["order", "flip", "crop", "contrast", "mixup", "transpose"],
)
def test_transforms_change_an_input(change):
    inputs = images()
    assert same_input(input_signature(inputs), input_signature(change(inputs))).float().mean() < 0.05


def test_the_chance_of_a_wrong_sample_to_pass_is_small():
    a, b = torch.randn(200_000, 16), torch.randn(200_000, 16)
    a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)  # equal norms: projections alone decide
    assert same_input(input_signature(a), input_signature(b)).float().mean() < 3e-5


def test_signs_are_fixed_for_ever():
    signature = input_signature(torch.eye(6))
    assert signature[:, 0].tolist() == [1.0] * 6
    first = 11749869230777074271  # of PCG64 with seed 0: its famous 0.6369616873214543, times 2 ** 64
    bits = [byte >> place & 1 for byte in first.to_bytes(8, "little") for place in range(7, -1, -1)]
    assert signature[:, 1:].flatten().tolist() == [2.0 * bit - 1 for bit in bits[:18]]


def test_padding_is_no_part_of_a_text():
    tokens = torch.randint(1, 50_000, (8, 12))
    lengths = torch.arange(5, 13)
    right = torch.arange(12) < lengths.unsqueeze(1)
    left, moved = right.flip(1), torch.zeros_like(tokens)
    moved[left] = tokens[right]
    wide = torch.cat([tokens, torch.full((8, 5), 3)], dim=1)
    expected = input_signature(tokens, mask=right)
    assert torch.allclose(input_signature(moved, mask=left.long()), expected)
    assert torch.allclose(input_signature(wide, mask=torch.cat([right, torch.zeros(8, 5).bool()], 1)), expected)
    shifted = input_signature((tokens + 1) * right, mask=right)
    assert not same_input(expected, shifted).any()
    assert not same_input(input_signature(tokens), input_signature(tokens.flip(1))).any()


def test_what_is_not_known_agrees_and_nan_does_not():
    unknown = torch.full((1, 4), float("nan"))
    known = input_signature(torch.ones(1, 3))
    assert same_input(unknown, known).all()
    assert not same_input(known, input_signature(torch.full((1, 3), float("nan")))).any()
    zeros = input_signature(torch.zeros(1, 3))
    assert same_input(zeros, zeros).all()


def test_bytes_and_flags_are_inputs_too():
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    assert same_input(input_signature(pixels), input_signature(pixels.clone())).all()
    assert not same_input(input_signature(pixels), input_signature(pixels.flip(-1))).any()
    assert input_signature(torch.tensor([[True, False]])).isfinite().all()
