"""Transforms of the student's features: formulas, laziness, checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_distill.losses.lazy import Lazy, is_unbuilt
from lightning_distill.losses.transforms import LinearTransform, MLPTransform, channels_last, resize


def built(transform, student, teacher):
    transform.build((1, student), (1, teacher))
    return transform.double()


@pytest.mark.chapter("A22", api="lightning_distill.losses.LinearTransform")
def test_linear_transform_matches_golden(golden):
    case = golden("linear_projection_mse")
    transform = built(LinearTransform(), 3, 5)
    transform.linear.load_state_dict({"weight": case.inputs["W"], "bias": case.inputs["b"]})
    torch.testing.assert_close(
        transform(case.inputs["F_S"]), case.expected["projected"], rtol=case.rtol, atol=case.atol
    )


@pytest.mark.chapter("A22", api="lightning_distill.losses.LinearTransform")
@pytest.mark.parametrize(("student", "teacher"), [(3, 7), (7, 3), (4, 4)])
def test_linear_transform_starts_without_stretching(student, teacher):
    transform = built(LinearTransform(), student, teacher)
    values = torch.linalg.svdvals(transform.linear.weight)
    torch.testing.assert_close(values, torch.ones_like(values))
    assert transform(torch.zeros(2, 5, student).double()).abs().max() == 0


@pytest.mark.chapter("A23", api="lightning_distill.losses.LinearTransform")
def test_on_maps_the_linear_transform_is_a_1x1_convolution(golden):
    case = golden("conv1x1")
    transform = built(LinearTransform(bias=False), 3, 4)
    transform.linear.load_state_dict({"weight": case.inputs["weight_out_in"]})
    transformed = transform(channels_last(case.inputs["x_NCHW"])).movedim(-1, 1)
    torch.testing.assert_close(transformed, case.expected["y"], rtol=case.rtol, atol=case.atol)
    convolved = F.conv2d(case.inputs["x_NCHW"], case.inputs["weight_out_in"][:, :, None, None])
    torch.testing.assert_close(transformed, convolved)


@pytest.mark.chapter("A24", api="lightning_distill.losses.resize")
def test_pooling_matches_golden(golden):
    case = golden("adaptive_avg_pool")
    line, image = case.inputs["x1d"][None, :, None], case.inputs["x2d"][None, :, :, None]
    for features, size, expected in [
        (line, (int(case.inputs["out1d"]),), case.expected["y1d"]),
        (image, tuple(case.inputs["out2d"].int().tolist()), case.expected["y2d"]),
        (line, (int(case.inputs["up1d"]),), case.expected["y_up"]),
    ]:
        pooled = resize(features, size, mode="pool")
        torch.testing.assert_close(pooled[0, ..., 0], expected, rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("A24", api="lightning_distill.losses.resize")
def test_resizing_pools_downwards_and_interpolates_upwards():
    features = torch.randn(2, 4, 6, 3)
    assert resize(features, (4, 6)) is features
    torch.testing.assert_close(resize(features, (2, 3)), features.reshape(2, 2, 2, 3, 2, 3).mean(dim=(2, 4)))
    up = resize(features, (8, 6))
    assert up.shape == (2, 8, 6, 3)
    torch.testing.assert_close(up[:, 1], 0.75 * features[:, 0] + 0.25 * features[:, 1])  # a quarter of the way
    assert not torch.equal(up, resize(features, (8, 6), mode="pool"))
    assert resize(torch.randn(2, 3, 4, 5, 1), (2, 2, 2)).shape == (2, 2, 2, 2, 1)
    constant = torch.full((1, 5, 2), 3.0)
    for mode in ("pool", "interpolate"):
        torch.testing.assert_close(resize(constant, (3,), mode), torch.full((1, 3, 2), 3.0))


def test_resizing_refuses_other_dimensions():
    with pytest.raises(ValueError, match=r"positions \(4, 6\) cannot be brought to positions \(3,\). Tap layers whose"):
        resize(torch.zeros(2, 4, 6, 3), (3,))
    with pytest.raises(ValueError, match=r"positions \(\) cannot be brought"):
        resize(torch.zeros(2, 4), ())
    with pytest.raises(ValueError, match="`mode` must be 'auto', 'pool' or 'interpolate', got 'max'"):
        resize(torch.zeros(2, 4, 3), (2,), mode="max")


@pytest.mark.chapter("A25", api="lightning_distill.losses.MLPTransform")
def test_mlp_transform_matches_golden(golden):
    case = golden("nonlinear_transform")
    transform = built(MLPTransform(hidden=6), 3, 5)
    names = {"0.weight": "W1", "0.bias": "b1", "2.weight": "W2", "2.bias": "b2"}
    transform.layers.load_state_dict({ours: case.inputs[theirs] for ours, theirs in names.items()})
    torch.testing.assert_close(transform(case.inputs["F_S"]), case.expected["y"], rtol=case.rtol, atol=case.atol)


@pytest.mark.chapter("A25", api="lightning_distill.losses.MLPTransform")
def test_mlp_transform_ends_as_told_and_hands_gradients_on():
    features = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    normal = built(MLPTransform(output="layernorm"), 3, 5)(features)
    torch.testing.assert_close(normal.mean(dim=-1), torch.zeros(6).double(), rtol=0, atol=1e-9)
    smooth = built(MLPTransform(output="gelu"), 3, 5)
    torch.testing.assert_close(smooth(features), F.gelu(smooth.layers[:3](features)))
    assert smooth.layers[0].out_features == 5  # the wider side
    smooth(features).sum().backward()
    assert features.grad.abs().sum() > 0


@pytest.mark.parametrize("transform", [LinearTransform, MLPTransform])
def test_parts_are_made_once_for_shapes_without_the_batch_size(transform):
    part = nn.Sequential(nn.ReLU(), transform())
    assert is_unbuilt(part)
    assert not list(part.parameters())
    part[1].build((8, 5, 3), (8, 5, 7))
    assert not is_unbuilt(part)
    before = [parameter.clone() for parameter in part.parameters()]
    part[1].build((4, 5, 3), (4, 5, 7))
    assert all(map(torch.equal, before, part.parameters()))
    with pytest.raises(
        ValueError, match=r"built for features of shapes \(B, 5, 3\) and \(B, 5, 7\), but now .* \(B, 5, 4\)"
    ):
        part[1].build((8, 5, 4), (8, 5, 7))


@pytest.mark.parametrize("transform", [LinearTransform, MLPTransform])
def test_a_state_dict_builds_what_it_is_loaded_into(transform, tmp_path):
    first, second = transform(), transform()
    first.build((1, 3), (1, 7))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(4, 3)
    assert torch.equal(first(x), second(x))
    third = transform()
    third.load_state_dict(transform().state_dict())  # of one that was not built either
    assert is_unbuilt(third)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="`hidden` must be positive, got 0"):
        MLPTransform(hidden=0)
    with pytest.raises(ValueError, match="`output` must be 'identity', 'layernorm' or 'gelu', got 'tanh'"):
        MLPTransform(output="tanh")
    with pytest.raises(TypeError, match="Lazy is a `Lazy` without a `make"):
        Lazy().build((1, 2))


def test_channels_are_found():
    assert channels_last(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5, 3)
    assert channels_last(torch.zeros(2, 3, 4, 5, 6)).shape == (2, 4, 5, 6, 3)
    assert channels_last(torch.zeros(2, 4, 3)).shape == (2, 4, 3)
    assert channels_last(torch.zeros(2, 3, 4), channel_dim=1).shape == (2, 4, 3)
    assert channels_last(torch.zeros(2, 3)).shape == (2, 3)
